"""Reading and writing files of the safetensors format, part by part (https://github.com/huggingface/safetensors).

A file is the length of its header in 8 bytes, little-endian; the header, JSON with dtype, shape and place of each
tensor; and the tensors' bytes, row-major, little-endian, without gaps. Ours are read by any safetensors reader. The
library itself writes only from memory that it is given all at once, and hashes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch

from accel_parallel.box import Box
from accel_parallel.checkpoint.folder import File, Folder
from accel_state.errors import CheckpointError

__all__ = [
    "StoredTensor", "TensorFile", "TensorShape", "as_bytes", "bytes_of", "file_header", "name_of_dtype",
    "order_in_file",
]  # fmt: skip

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64",
}  # fmt: skip
"""Names of dtypes in a header, and in torch."""
_HEADER_LIMIT = 100_000_000
"""Bytes of a header that readers of the format accept."""


class TensorShape(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return self.numel * self.dtype.itemsize


def name_of_dtype(dtype: torch.dtype) -> str | None:
    """What a header calls a dtype; ``None`` where a file cannot hold it."""
    return _names_by_dtype().get(dtype)


@cache
def _names_by_dtype() -> Mapping[object, str]:
    """Made once: asking for one takes longer than all else that is done for a small tensor."""
    return {getattr(torch, ours, None): theirs for theirs, ours in _NAMES.items()}


def order_in_file(tensors: Mapping[str, TensorShape]) -> list[str]:
    """Names in the order in which their tensors lie in a file: each then begins at a multiple of its elements' size."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def file_header(tensors: Mapping[str, TensorShape]) -> bytes:
    """What a file with these tensors begins with; their bytes follow, in the order of `order_in_file`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order_in_file(tensors):
        found = tensors[name]
        end = begin + found.nbytes
        entries[name] = {
            "dtype": name_of_dtype(found.dtype), "shape": list(found.shape), "data_offsets": [begin, end]
        }  # fmt: skip
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The values as bytes in row-major order, of one dim; a copy only where they do not lie so."""
    flat = tensor.detach().contiguous().reshape(-1)
    # One value alone counts as contiguous whatever its stride, and a view of it does not.
    return (flat if flat.stride() == (1,) else flat.new_empty(flat.shape).copy_(flat)).view(torch.uint8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The same of a tensor on the CPU, as Python's files take them."""
    return as_bytes(tensor).numpy().data if tensor.numel() else memoryview(b"")


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
        length = int.from_bytes(self._file.view(0, 8), "little") if size >= 8 else _HEADER_LIMIT
        try:
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError("it is shorter than its header says")
            header = json.loads(bytes(self._file.view(8, 8 + length)))
            found = _entries(header, size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def _entries(header: Any, size: int) -> dict[str, tuple[TensorShape, int]]:
    """Each tensor of a header, and where it begins in the `size` bytes behind; they fill these without a gap.

    Raises:
        ValueError: if they do not. What is no header at all raises a KeyError, TypeError or AttributeError.
    """
    found: dict[str, tuple[TensorShape, int]] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = getattr(torch, _NAMES.get(entry["dtype"], ""), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch {torch.__version__} has no dtype {entry['dtype']}")
        begin, end = entry["data_offsets"]
        shape = TensorShape(tuple(entry["shape"]), dtype)
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape.shape, begin, end)):
            raise ValueError(f"`{name}` has a shape or a place of other than whole numbers")
        if end - begin != shape.nbytes:
            raise ValueError(f"`{name}` has {end - begin} bytes instead of {shape.nbytes}")
        found[name] = (shape, begin)
        places.append((begin, end, name))
    filled = 0
    for begin, end, name in sorted(places):
        if begin != filled:
            raise ValueError(f"`{name}` begins at byte {begin}, and what is before it ends at {filled}")
        filled = end
    if filled != size:
        raise ValueError(f"its tensors take {filled} bytes, and it holds {size}")
    return found


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

    def view(self) -> torch.Tensor:
        """All of it, good for copying from: its memory may be that of the file."""
        return self.file.view(self.name)

    def read(self, box: Box | None = None) -> torch.Tensor:
        """A part of it, by default all, on the CPU and in memory of its own."""
        if box is None or not self.shape:
            return self.view().clone()
        rows, *rest = box.slices
        part = self.file.view(self.name, rows)
        columns = (slice(None), *rest)
        return part[columns].clone(memory_format=torch.contiguous_format)
