"""Loading checkpoints into models: right into memory that is made once, in the dtype and on the device that is wanted.

| module | what it owns |
|---|---|
| `checkpoint` | `load_checkpoint_in_model` |
| `dispatching` | `load_checkpoint_and_dispatch` |
| `source`, `pickled` | what a checkpoint holds |
| `match`, `fused`, `place`, `plan` | which tensor comes from where, goes where, and as what |
| `delivery`, `box`, `engine`, `lane` | reading in parallel and copying behind it |
| `shared` | several ranks that read once |
| `memory`, `converted`, `carry_out`, `result` | where values go, and what was done |
"""

from __future__ import annotations

from accel_bigmodel.loading.checkpoint import load_checkpoint_in_model
from accel_bigmodel.loading.delivery import ReadSettings
from accel_bigmodel.loading.dispatching import load_checkpoint_and_dispatch
from accel_bigmodel.loading.result import LoadedCheckpoint

__all__ = ["LoadedCheckpoint", "ReadSettings", "load_checkpoint_and_dispatch", "load_checkpoint_in_model"]
