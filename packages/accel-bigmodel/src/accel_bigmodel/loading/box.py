"""Parts of tensors along all dims, and how a tensor is cut into such that lie in one piece in its file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

__all__ = ["Box", "cut", "index_of", "meet", "offset_of", "shape_of", "whole"]

Box: TypeAlias = tuple[tuple[int, int], ...]
"""Begin and end along each dim."""


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    """Its size along each dim."""
    return tuple(end - begin for begin, end in box)


def meet(first: Box, second: Box) -> Box | None:
    """What is in both, ``None`` if nothing is."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return found if all(begin < end for begin, end in found) else None


def index_of(box: Box, within: Box) -> tuple[slice, ...]:
    """Where `box` is in a tensor that holds `within`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, within, strict=True))


def offset_of(box: Box, shape: tuple[int, ...]) -> int:
    """Number of elements before the first one of `box` in a row-major tensor of `shape`."""
    found = 0
    for (begin, _), size in zip(box, shape, strict=True):
        found = found * size + begin
    return found


def cut(shape: tuple[int, ...], limit: int, rows: tuple[int, int] | None = None) -> Iterator[Box]:
    """Boxes of at most `limit` elements that lie in one piece in a row-major tensor, in order; together all of it.

    Args:
        shape: of the tensor, without a size of 0.
        limit: at least 1.
        rows: begin and end along dim 0, if not all of it is wanted.
    """
    if not shape:
        yield ()
        return
    begin, end = rows or (0, shape[0])
    inner = math.prod(shape[1:])
    if inner <= limit:
        step = limit // inner
        for row in range(begin, end, step):
            yield ((row, min(row + step, end)), *whole(shape[1:]))
        return
    for row in range(begin, end):
        for rest in cut(shape[1:], limit):
            yield ((row, row + 1), *rest)
