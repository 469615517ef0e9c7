"""What differs between two states: tensors read a piece at a time, and the values beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from accel_parallel.checkpoint.tensor_file import StoredTensor
from accel_state.tensor_format import as_bytes

__all__ = ["Tolerance", "compare_states", "compare_tensors"]

_PIECE_BYTES = 16 << 20
"""Of a tensor that is in memory at once, and a few copies of it in float64."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Values differ where ``|a - b| > atol + rtol * |b|``."""

    rtol: float = 0.0
    atol: float = 0.0


@dataclass(frozen=True, slots=True)
class _Difference:
    count: int
    largest: float


def compare_tensors(
    a: Mapping[str, StoredTensor], b: Mapping[str, StoredTensor], tolerance: Tolerance, step: Callable[[int], None]
) -> list[str]:
    """What differs between the tensors of two items, the summary first; nothing where none does.

    Args:
        a: tensors by name.
        b: the other item's.
        tolerance: what counts as different.
        step: called with the bytes of each piece that was read of `a`.
    """
    lines = [f"{name}: only in A" for name in a if name not in b]
    lines += [f"{name}: only in B" for name in b if name not in a]
    differing: list[_Difference] = []
    common = [name for name in a if name in b]
    for name in common:
        ours, theirs = a[name], b[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            lines.append(f"{name}: {_kind(ours)} in A, {_kind(theirs)} in B")
            step(ours.nbytes)
            continue
        found = _compare(ours, theirs, tolerance, step)
        if found.count:
            differing.append(found)
            lines.append(f"{name}: {found.count:,} of {prod(ours.shape):,} values, by at most {found.largest:.6g}")
    if differing:
        largest = max((each.largest for each in differing), key=lambda value: (math.isnan(value), value))
        lines.insert(0, f"values of {len(differing)} of {len(common)} common tensors, by at most {largest:.6g}")
    return lines


def compare_states(a: Any, b: Any, tolerance: Tolerance, path: str = "") -> Iterator[str]:
    """What differs between two states but for their tensors, by path."""
    if isinstance(a, StoredTensor) and isinstance(b, StoredTensor):
        return
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from _compare_member(a, b, key, inner, tolerance)
        return
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and type(a) is type(b):
        if len(a) != len(b):
            yield f"{path}: {len(a)} entries in A, {len(b)} in B"
            return
        for index, (ours, theirs) in enumerate(zip(a, b, strict=True)):
            yield from compare_states(ours, theirs, tolerance, f"{path}.{index}")
        return
    if not _same_value(a, b, tolerance):
        yield f"{path}: {_short(a)} in A, {_short(b)} in B"


def _compare_member(
    a: Mapping[Any, Any], b: Mapping[Any, Any], key: Any, path: str, tolerance: Tolerance
) -> Iterator[str]:
    if key in a and key in b:
        yield from compare_states(a[key], b[key], tolerance, path)
        return
    mark, value = ("A", a[key]) if key in a else ("B", b[key])
    if not isinstance(value, StoredTensor):  # a tensor has been named already
        yield f"{path}: {_short(value)} only in {mark}"


def _same_value(a: Any, b: Any, tolerance: Tolerance) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        return bool(a == b or abs(a - b) <= tolerance.atol + tolerance.rtol * abs(b))
    return bool(a == b)


def _short(value: Any) -> str:
    if isinstance(value, StoredTensor):
        return _kind(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _compare(a: StoredTensor, b: StoredTensor, tolerance: Tolerance, step: Callable[[int], None]) -> _Difference:
    count, largest = 0, 0.0
    for rows in _pieces(a):
        ours, theirs = a.file.view(a.name, rows), b.file.view(b.name, rows)
        if not torch.equal(as_bytes(ours), as_bytes(theirs)):
            found = _compare_piece(ours, theirs, tolerance)
            count += found.count
            largest = max(largest, found.largest, key=lambda value: (math.isnan(value), value))
        step(ours.nbytes)
    return _Difference(count, largest)


def _pieces(tensor: StoredTensor) -> Iterator[slice]:
    if not tensor.shape:
        yield slice(None)
        return
    length = tensor.shape[0]
    rows = max(1, _PIECE_BYTES // max(1, tensor.nbytes // max(1, length)))
    for begin in range(0, length, rows):
        yield slice(begin, min(begin + rows, length))


def _compare_piece(a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance) -> _Difference:
    ours, theirs = _wide(a), _wide(b)
    distance = (ours - theirs).abs() if ours.is_floating_point() or ours.is_complex() else _apart(ours, theirs)
    differ = ours != theirs
    if ours.is_floating_point() or ours.is_complex():
        both_nan = ours.isnan() & theirs.isnan()
        differ &= ~both_nan
    if tolerance.rtol or tolerance.atol:
        allowed = tolerance.atol + tolerance.rtol * theirs.abs().double()
        differ &= ~((distance <= allowed) & distance.isfinite())
    count = int(differ.sum())
    # Of infinities of one sign, and where only one is NaN, the distance is NaN: the largest there is.
    return _Difference(count, float(distance[differ].max()) if count else 0.0)


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of integers, in a type in which their difference cannot overflow."""
    return (a.double() - b.double()).abs()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In a type that has all operations and loses nothing. Of 64-bit unsigned integers, bits are compared as signed."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    if tensor.is_floating_point():
        return tensor.to(torch.float64)
    return tensor.view(torch.int64) if tensor.dtype.itemsize == 8 else tensor.to(torch.int64)
