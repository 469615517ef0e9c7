"""The same for batches that a batch sampler of the user's has made: which of them go to which data rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accel_data.partition import share_of, split_real_rows, split_rows

__all__ = ["BatchGroups", "num_groups"]


def num_groups(num_batches: int, rank: int, world: int, *, even: bool, split: bool) -> int:
    """Batches that `rank` gets of `num_batches` of the sampler's.

    Exact but for `split` without `even`, where a batch of fewer samples than ranks leaves some ranks out.
    """
    if split:
        return num_batches
    return -(-num_batches // world) if even else (num_batches - rank + world - 1) // world


class BatchGroups:
    """Batches of a batch sampler, in its order, dealt out to the data ranks.

    Rank *r* gets in step *s* the batch ``s * world + r``. Where the last group has fewer batches than ranks,
    the others get the first batch of that group as padding, no row of which is real (`even`), or nothing.

    Args:
        batches: all batches from the cursor on; each is a list of indices.
        world: number of data ranks.
        even: whether every rank gets a batch in every step.
        split: the sampler's batches are global ones: each is cut among the ranks, like a partial global batch.
    """

    def __init__(self, batches: Sequence[Sequence[Any]], *, world: int, even: bool = True, split: bool = False) -> None:
        self._batches = batches
        self._world = world
        self._even = even
        self._split = split
        self._group = 1 if split else world

    @property
    def num_batches(self) -> int:
        """Number of steps."""
        return -(-len(self._batches) // self._group)

    @property
    def may_pad(self) -> bool:
        """Whether any step holds padding."""
        if not self._even:
            return False
        if self._split:
            return any(len(batch) % self._world for batch in self._batches)
        return len(self._batches) % self._world > 0

    def rows(self, step: int) -> tuple[int, ...]:
        """Rows of each rank in `step`, padding included."""
        if self._split:
            return split_rows(len(self._batches[step]), self._world, even=self._even)
        real = self.real_rows(step)
        missing = self._world - self._num_in(step)
        return real[: self._world - missing] + (real[0] if self._even else 0,) * missing

    def real_rows(self, step: int) -> tuple[int, ...]:
        """Real rows of each rank in `step`."""
        if self._split:
            return split_real_rows(len(self._batches[step]), self._world, even=self._even)
        first = step * self._world
        real = tuple(len(batch) for batch in self._batches[first : first + self._world])
        return real + (0,) * (self._world - len(real))

    def taken(self, step: int, rank: int) -> tuple[int, Sequence[int]] | None:
        """Which batch `rank` takes rows of in `step`, and which rows; ``None`` where it gets none."""
        if self._split:
            share = share_of(len(self._batches[step]), rank, self._world, even=self._even)
            return (step, share.positions) if share.rows else None
        first = step * self._world
        if rank < self._num_in(step):
            return first + rank, range(len(self._batches[first + rank]))
        return (first, range(len(self._batches[first]))) if self._even else None

    def batch(self, number: int) -> Sequence[Any]:
        """One of the batches."""
        return self._batches[number]

    def consumed(self, num_batches: int) -> int:
        """Batches of the sampler's that the first `num_batches` steps use up."""
        return min(num_batches * self._group, len(self._batches))

    def _num_in(self, step: int) -> int:
        return min(self._world, len(self._batches) - step * self._world)
