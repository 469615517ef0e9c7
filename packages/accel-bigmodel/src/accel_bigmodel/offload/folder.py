"""Weights of a model in memory written to a folder, where they are read while the model is used."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from accel_bigmodel.loading.converted import ConvertedFile
from accel_bigmodel.stored import StoredTensor
from accel_state.tensor_format import TensorShape

__all__ = ["OffloadFile"]

_PATTERN = "offloaded-*.safetensors"


class OffloadFile:
    """A safetensors file with weights of this process's model, there as long as this object is.

    Every one has a name of its own, so that two processes may share a folder. It is locked while it is used, and what
    processes that were killed left behind is removed when the next one comes.

    Args:
        folder: made where it is missing.
        tensors: what to write. Nothing is written where there are none.

    Raises:
        CheckpointError: if the disk has no room.
        ConfigError: if safetensors files cannot hold a dtype.
        OSError: if it cannot be written.
    """

    def __init__(self, folder: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
        folder = Path(folder).resolve()
        self.stored: dict[str, StoredTensor] = {}
        """Where each tensor is."""
        if not tensors:
            return
        _sweep(folder)
        path = folder / f"offloaded-{secrets.token_hex(8)}.safetensors"
        shapes = {name: TensorShape(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        with ConvertedFile(path, shapes) as file:
            for name, tensor in tensors.items():
                file.tensors[name].copy_(tensor.detach())
            self.stored = file.commit()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, _remove, path, descriptor, os.getpid())
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def _remove(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # a process that was forked from it only closes what it got
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove the files that nobody holds: their processes were killed."""
    for path in folder.glob(_PATTERN):
        with contextlib.suppress(OSError), path.open("rb") as stream:  # held, or another one removes it too
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
