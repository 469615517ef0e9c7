"""Checkpoints that are whole or not there: items become files, files a manifest, the manifest a rename.

====================  ==========================================================
`codec`               a state of any shape, split into JSON and tensors, without pickle
`manifest`            what a checkpoint says of itself: items, files, sizes, checksums
`parts`               tensors that are divided over ranks
`store`               writing and reading one item's files
`commit`              temporary folder, manifest, one rename: every rank takes part
`layout`              names of folders, which is the latest, which may go
====================  ==========================================================

Names are imported when they are first used: a run that never saves never loads them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_parallel.checkpoint.commit import save_checkpoint as save_checkpoint
    from accel_parallel.checkpoint.layout import latest_checkpoint as latest_checkpoint
    from accel_parallel.checkpoint.layout import next_number as next_number
    from accel_parallel.checkpoint.layout import numbered_path as numbered_path
    from accel_parallel.checkpoint.layout import prune as prune
    from accel_parallel.checkpoint.manifest import Manifest as Manifest
    from accel_parallel.checkpoint.parts import PART as PART
    from accel_parallel.checkpoint.parts import StoredTensor as StoredTensor
    from accel_parallel.checkpoint.parts import divide as divide
    from accel_parallel.checkpoint.parts import gather as gather
    from accel_parallel.checkpoint.store import Checkpoint as Checkpoint
    from accel_parallel.checkpoint.store import Item as Item

_HOME = {
    "save_checkpoint": "commit",
    "latest_checkpoint": "layout",
    "next_number": "layout",
    "numbered_path": "layout",
    "prune": "layout",
    "Manifest": "manifest",
    "PART": "parts",
    "StoredTensor": "parts",
    "divide": "parts",
    "gather": "parts",
    "Checkpoint": "store",
    "Item": "store",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
