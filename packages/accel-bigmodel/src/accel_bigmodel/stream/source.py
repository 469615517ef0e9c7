"""Where the bytes of a unit come from: memory of the host, or files that stay as they are."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from accel_bigmodel.stored import StoredTensor, map_tensor, read_bytes
from accel_bigmodel.stream.layout import Layout

__all__ = ["FileSource", "HostSource", "OpenFile", "Source"]


class Source(Protocol):
    """The values of one unit's tensors while they are not on the device."""

    layout: Layout

    @property
    def pinned(self) -> torch.Tensor | None:
        """All bytes in one piece that a device copies from by itself; None where they have to be read."""

    def read(self, begin: int, destination: torch.Tensor) -> None:
        """Fill `destination`, uint8 on the host, with the bytes from `begin` on. Called by several threads at once.

        Raises:
            CheckpointError: if a file was cut short.
            OSError: if it cannot be read.
        """

    def tensor(self, index: int) -> torch.Tensor:
        """One tensor on the host; its memory may be the source's own."""

    def writable(self, index: int) -> torch.Tensor:
        """Memory whose values count from now on instead of what the source had, with the shape and dtype of the tensor.

        Called for what a forward changed, and where a state is loaded.
        """

    def copy(self) -> Source:
        """One with values of its own."""


class HostSource:
    """In memory of the host."""

    def __init__(self, layout: Layout, flat: torch.Tensor, *, is_pinned: bool) -> None:
        self.layout = layout
        self._flat = flat
        self._is_pinned = is_pinned

    @property
    def pinned(self) -> torch.Tensor | None:
        """See `Source`."""
        return self._flat if self._is_pinned else None

    def read(self, begin: int, destination: torch.Tensor) -> None:
        """See `Source`."""
        destination.copy_(self._flat.narrow(0, begin, destination.numel()))

    def tensor(self, index: int) -> torch.Tensor:
        """See `Source`. The memory itself."""
        return self.layout.view(self._flat, index)

    def writable(self, index: int) -> torch.Tensor:
        """See `Source`. The memory itself."""
        return self.layout.view(self._flat, index)

    def copy(self) -> Source:
        """See `Source`. Pinned where this is."""
        flat = torch.empty(self._flat.shape, dtype=torch.uint8, device="cpu", pin_memory=self._flat.is_pinned())
        return HostSource(self.layout, flat.copy_(self._flat), is_pinned=self._is_pinned)


class OpenFile:
    """A file that is open for reading until nobody has this any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)


class FileSource:
    """In safetensors files, which are read where they are and never written.

    The files are held open: renaming, replacing or removing them changes nothing for whoever uses them.

    Args:
        layout: of the unit. Dtypes that differ from those in the files are converted while they are read.
        stored: the tensors, in the order of `layout`.
        keep: what has to live as long as this does, such as the owner of temporary files.
        files: those that are open already, to be shared and added to.

    Raises:
        OSError: if a file cannot be opened.
    """

    def __init__(
        self,
        layout: Layout,
        stored: Sequence[StoredTensor],
        *,
        keep: object = None,
        files: dict[Path, OpenFile] | None = None,
    ) -> None:
        self.layout = layout
        self._keep = keep
        self._files = files if files is not None else {}
        for path in {each.path for each in stored}:
            if path not in self._files:
                self._files[path] = OpenFile(path)
        self._stored = tuple(stored)
        self._changed: dict[int, torch.Tensor] = {}

    @property
    def pinned(self) -> None:
        """See `Source`. Never."""
        return None

    def read(self, begin: int, destination: torch.Tensor) -> None:
        """See `Source`. Gaps between tensors are left as they are."""
        end = begin + destination.numel()
        for index, offset in enumerate(self.layout.offsets):
            size = self.layout.size_bytes(index)
            first, last = max(begin, offset), min(end, offset + size)
            if first < last:
                self._read_part(index, first - offset, destination.narrow(0, first - begin, last - first))

    def _read_part(self, index: int, begin: int, destination: torch.Tensor) -> None:
        """Fill `destination` with bytes of one tensor from `begin` on, as the layout has them."""
        stored, dtype = self._stored[index], self.layout.dtypes[index]
        changed = self._changed.get(index)
        if changed is not None:
            destination.copy_(changed.view(-1).view(torch.uint8).narrow(0, begin, destination.numel()))
        elif dtype == stored.dtype:
            self._fill(stored, begin, destination)
        else:
            # Pieces are cut at multiples of `ALIGNMENT_BYTES`, and so never within a number.
            first, count = begin // dtype.itemsize, destination.numel() // dtype.itemsize
            raw = torch.empty(count * stored.dtype.itemsize, dtype=torch.uint8, device="cpu")
            self._fill(stored, first * stored.dtype.itemsize, raw)
            destination.copy_(raw.view(stored.dtype).to(dtype).view(torch.uint8))

    def _fill(self, stored: StoredTensor, begin: int, destination: torch.Tensor) -> None:
        read_bytes(self._files[stored.path].descriptor, stored, destination, begin=begin)

    def tensor(self, index: int) -> torch.Tensor:
        """See `Source`. Mapped, where the dtype is that of the file."""
        if index in self._changed:
            return self._changed[index]
        stored = self._stored[index]
        return map_tensor(stored, self._files[stored.path].descriptor).to(self.layout.dtypes[index])

    def writable(self, index: int) -> torch.Tensor:
        """See `Source`. Memory of the host, which is used instead of the file from then on."""
        if index not in self._changed:
            self._changed[index] = self.tensor(index).clone()
        return self._changed[index]

    def copy(self) -> Source:
        """See `Source`. The files are shared."""
        made = FileSource(self.layout, self._stored, keep=self._keep, files=self._files)
        made._changed = {index: tensor.clone() for index, tensor in self._changed.items()}
        return made
