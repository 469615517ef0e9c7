"""Files of tensors in a folder, wherever that is, read part by part. The format is `accel_state.tensor_format`'s."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod

import torch

from accel_parallel.box import Box
from accel_parallel.checkpoint.folder import File, Folder
from accel_state.errors import CheckpointError
from accel_state.tensor_format import HEADER_LIMIT_BYTES, TensorShape, parse_header

__all__ = ["StoredTensor", "TensorFile"]


class TensorFile:
    """One file, open for reading: which tensors it holds, and any part of each."""

    def __init__(self, folder: Folder, name: str) -> None:
        """
        Raises:
            CheckpointError: if it is no such file, or cut short.
            OSError: if it cannot be read.
        """
        self.location = f"{folder.location}/{name}"
        self._file: File = folder.open(name)
        self.entries = self._read_header()

    def _read_header(self) -> dict[str, tuple[TensorShape, int]]:
        """Each tensor, and where its bytes begin."""
        size = self._file.size_bytes
        length = int.from_bytes(self._file.view(0, 8), "little") if size >= 8 else HEADER_LIMIT_BYTES
        try:
            if length > min(size - 8, HEADER_LIMIT_BYTES):
                raise ValueError("it is shorter than its header says")
            found = parse_header(self._file.view(8, 8 + length), size - 8 - length)
        except ValueError as error:
            raise CheckpointError(
                f"`{self.location}` is no file of tensors ({error}). Restore it, or load another checkpoint."
            ) from error
        return {name: (shape, 8 + length + begin) for name, (shape, begin) in found.items()}

    def tensors(self) -> dict[str, StoredTensor]:
        """Each of its tensors by name, not read yet."""
        return {
            name: StoredTensor(torch.Size(found.shape), found.dtype, self, name)
            for name, (found, _) in self.entries.items()
        }

    def view(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor, or some of its rows, on the CPU; memory is the file's where that is mapped, so copy before keeping.

        Of an object store, only these rows are fetched.
        """
        (shape, dtype), begin = self.entries[name]
        if shape:
            first, last, _ = rows.indices(shape[0])
            stride = prod(shape[1:]) * dtype.itemsize
            begin, shape = begin + first * stride, (max(0, last - first), *shape[1:])
        if not prod(shape):
            return torch.empty(shape, dtype=dtype, device="cpu")
        size = prod(shape) * dtype.itemsize
        raw = torch.frombuffer(self._file.view(begin, begin + size), dtype=torch.uint8)
        if sys.byteorder == "big":
            raw = raw.view(-1, dtype.itemsize).flip(1).reshape(-1)
        # A file of somebody else's may have a header that is no multiple of 8 bytes.
        aligned = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, read when it is asked for."""

    shape: torch.Size
    dtype: torch.dtype
    file: TensorFile
    name: str

    @property
    def nbytes(self) -> int:
        """Of all its values."""
        return TensorShape(tuple(self.shape), self.dtype).nbytes

    def view(self, box: Box | None = None) -> torch.Tensor:
        """A part of it, by default all, on the CPU; good for copying from, since its memory may be that of the file."""
        if box is None or not self.shape:
            return self.file.view(self.name)
        rows, *rest = box.slices
        columns = (slice(None), *rest)
        return self.file.view(self.name, rows)[columns]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The same in memory of its own, contiguous."""
        return self.view(box).clone(memory_format=torch.contiguous_format)
