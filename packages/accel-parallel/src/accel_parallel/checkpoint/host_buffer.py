"""Host memory that tensors are copied into and another process writes from; used again by each save."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import torch

__all__ = ["HostBuffer"]

_ALIGNMENT = 64
"""Bytes; every tensor begins at a multiple, so that it can be seen as its dtype."""


class HostBuffer:
    """Grows to the largest save, and keeps its pages: filling fresh ones takes several times as long as a copy.

    On a CUDA device the memory is pinned, so that copies to it run at the speed of the bus.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self.descriptor = _anonymous_file()
        """A file in memory, which a process that inherits it sees too."""
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._map: mmap.mmap | None = None
        self._end = 0

    @property
    def nbytes(self) -> int:
        """Size of the memory."""
        return self._bytes.numel()

    def view(self) -> memoryview:
        """All of it, for a thread of this process."""
        return memoryview(self._map) if self._map is not None else memoryview(b"")

    def begin(self, nbytes: int, num_parts: int) -> None:
        """Make room for so many parts with so many bytes in all. What was there before is gone."""
        self._reserve(nbytes + num_parts * _ALIGNMENT)
        self._end = 0

    def put(self, content: bytes | torch.Tensor) -> tuple[int, int]:
        """Copy it behind what is there, and return where it lies.

        A copy from a device is under way when this returns: wait for the device before the memory is read.
        """
        begin = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        end = begin + (content.nbytes if isinstance(content, torch.Tensor) else len(content))
        if isinstance(content, torch.Tensor):
            if content.numel():
                target = self._bytes[begin:end].view(content.dtype).view(content.shape)
                target.copy_(content.detach(), non_blocking=True)
        elif self._map is not None:
            self._map[begin:end] = content
        self._end = end
        return begin, end

    def close(self) -> None:
        """Give the memory back. A process that has it open keeps it until it ends."""
        if self.descriptor >= 0:
            self._unmap()
            os.close(self.descriptor)
            self.descriptor = -1

    def _reserve(self, size: int) -> None:
        if size <= self.nbytes:
            return
        self._unmap()
        os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if self._pinned:
            runtime: Any = torch.cuda
            runtime.check_error(runtime.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0))

    def _unmap(self) -> None:
        if self._map is None:
            return
        if self._pinned:
            runtime: Any = torch.cuda
            runtime.check_error(runtime.cudart().cudaHostUnregister(self._bytes.data_ptr()))
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")  # lets go of the map, which has no further owner
        self._map = None


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("accel-checkpoint", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(prefix="accel-checkpoint-") as file:  # macOS has no such files
        return os.dup(file.fileno())
