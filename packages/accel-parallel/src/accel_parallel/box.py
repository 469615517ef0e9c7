"""Rectangular parts of tensors, and ranges of flattened tensors as such parts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "boxes_of_range"]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor."""

    offset: tuple[int, ...]
    """Of its first element, in each dim of the whole."""
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What cuts it out of the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing, as where there are more ranks than rows."""
        return 0 in self.shape

    def meet(self, other: Box) -> Box | None:
        """What both hold; ``None`` where that is nothing."""
        starts = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: Box) -> Box:
        """The same part, counted from the beginning of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def boxes_of_range(shape: Sequence[int], start: int, numel: int) -> list[Box]:
    """The elements `start` to `start` + `numel` of a tensor in row-major order, as the fewest boxes in that order.

    Each box is contiguous there, so laid end to end they are the range. There are at most two a dim and one more.
    """
    if numel == 0:
        return []
    if not shape:
        return [Box((), ())]
    row = 1
    for size in shape[1:]:
        row *= size
    found: list[Box] = []
    while numel:
        index, inside = divmod(start, row)
        if inside == 0 and numel >= row:  # whole rows
            count = numel // row
            found.append(Box((index, *[0] * (len(shape) - 1)), (count, *shape[1:])))
            taken = count * row
        else:  # a part of one row
            taken = min(row - inside, numel)
            found += [Box((index, *box.offset), (1, *box.shape)) for box in boxes_of_range(shape[1:], inside, taken)]
        start, numel = start + taken, numel - taken
    return found
