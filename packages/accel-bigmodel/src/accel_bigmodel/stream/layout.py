"""Where the tensors of a unit lie in its bytes, so that a unit travels as one piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["ALIGNMENT_BYTES", "Layout"]

ALIGNMENT_BYTES = 512
"""Tensors begin at multiples of this, as those that the allocators of devices give."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors behind each other in one piece of memory."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    """Bytes before each tensor."""
    num_bytes: int
    """Of the whole piece, gaps included."""

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> Layout:
        """Tensors of these shapes and dtypes in this order."""
        offsets, end = [], 0
        for shape, dtype in zip(shapes, dtypes, strict=True):
            offsets.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tuple(tuple(shape) for shape in shapes), tuple(dtypes), tuple(offsets), end)

    def size_bytes(self, index: int) -> int:
        """Bytes of one tensor."""
        return math.prod(self.shapes[index]) * self.dtypes[index].itemsize

    def bytes_of(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """The bytes of one tensor in `flat`, uint8 of `num_bytes`."""
        return flat.narrow(0, self.offsets[index], self.size_bytes(index))

    def view(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """One tensor in `flat`, contiguous. It counts changes in place for itself (``_version``), from 0."""
        found: torch.Tensor = self.bytes_of(flat, index).view(self.dtypes[index]).view(self.shapes[index]).data
        return found

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """All tensors in `flat`."""
        return [self.view(flat, index) for index in range(len(self.shapes))]
