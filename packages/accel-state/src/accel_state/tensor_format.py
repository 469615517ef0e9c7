"""Tensors in a file of the safetensors format: its header, and tensors as bytes.

A file is the length of its header in 8 bytes, little-endian; the header, JSON with dtype, shape and place of each
tensor; and the tensors' bytes, row-major, little-endian, without gaps (https://github.com/huggingface/safetensors).
The library reads whole tensors into fresh memory, and writes from memory that it is given all at once. Who reads parts,
or into memory of its own, or writes as it goes, needs to know where the bytes are: checkpoints and big models do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch

__all__ = [
    "HEADER_LIMIT_BYTES", "TensorShape", "as_bytes", "bytes_of", "file_header", "name_of_dtype", "order_in_file",
    "parse_header",
]  # fmt: skip

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64",
}  # fmt: skip
"""Names of dtypes in a header, and in torch."""
HEADER_LIMIT_BYTES = 100_000_000
"""The longest header that readers of the format accept."""


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


def parse_header(text: bytes | memoryview, data_bytes: int) -> dict[str, tuple[TensorShape, int]]:
    """Each tensor that a header describes, and where its bytes begin behind the header.

    Args:
        text: the JSON, without the 8 bytes of its length.
        data_bytes: what follows it in the file. The tensors must fill it without a gap.

    Raises:
        ValueError: if they do not, or it is no header.
    """
    try:
        return _entries(json.loads(bytes(text)), data_bytes)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header makes no sense: {type(error).__name__}: {error}") from error


def _entries(header: Any, size: int) -> dict[str, tuple[TensorShape, int]]:
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
