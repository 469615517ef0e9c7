"""A range of a flattened tensor, which is how ZeRO divides what it divides (Rajbhandari et al., arXiv:1910.02054)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from accel_parallel.box import Box, boxes_of_range

__all__ = ["FlatPart"]


@dataclass(frozen=True, slots=True)
class FlatPart:
    """This rank's range of a tensor in row-major order. The ranges of all ranks of `group` make the tensor."""

    shape: torch.Size
    """Of the whole."""
    start: int
    """Of this rank's range, in elements."""
    local: torch.Tensor
    """The range, of one dim; none at all where there are fewer elements than ranks."""
    group: Any
    """Process group of the ranks that share it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.local.dtype

    def clone(self) -> FlatPart:
        """The same in memory of its own."""
        return FlatPart(self.shape, self.start, self.local.clone(), self.group)

    def pieces(self) -> list[tuple[Box, torch.Tensor]]:
        """The range as rectangular parts of the whole, each with its elements, in their order."""
        found, begin = [], 0
        for box in boxes_of_range(self.shape, self.start, self.local.numel()):
            found.append((box, self.local[begin : begin + box.numel].detach().view(box.shape)))
            begin += box.numel
        return found

    def whole(self) -> torch.Tensor:
        """The tensor, on each rank of the group, all of which must call this. Bit by bit what the ranges hold."""
        full = torch.zeros(self.shape.numel(), dtype=self.dtype, device=self.local.device)
        full[self.start : self.start + self.local.numel()] = self.local.detach()
        # Bytes that only one rank has other than zero: their sum is a union, and exact for every dtype.
        dist.all_reduce(full.view(torch.uint8), group=self.group)
        return full.view(self.shape)
