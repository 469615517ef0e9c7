"""The rest of an epoch as a plan, and the batch sampler that gives the underlying DataLoader its part of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Sampler

from accel_data.batches import BatchGroups
from accel_data.order import EpochOrder, SequentialOrder
from accel_data.partition import GlobalBatches
from accel_data.parts import PartedBatches, Parts
from accel_data.position import Position

__all__ = ["BatchPlan", "EpochPlan", "PartedPlan", "Rows", "SamplePlan", "ShardedBatchSampler"]

_FIRST_CHUNK, _LAST_CHUNK = 4096, 16384  # indices; the first ones in 0.4 ms, the others in under 0.1 µs each


class Rows(NamedTuple):
    """One batch of one rank."""

    positions: Sequence[int]
    """Of each row in the order of the epoch (in that of the rank's part, where there are parts)."""
    indices: list[Any]
    """What the dataset is asked for."""


class EpochPlan(Protocol):
    """The rest of an epoch, cut into global batches; numbers of batches count from its start."""

    @property
    def num_batches(self) -> int: ...
    @property
    def num_full(self) -> int:
        """How many batches at the front have the rows of the first one, all real."""

    @property
    def may_pad(self) -> bool: ...
    @property
    def has_gaps(self) -> bool:
        """Whether a rank may get no rows in a step and some in a later one."""

    def rows(self, step: int) -> tuple[int, ...]: ...
    def real_rows(self, step: int) -> tuple[int, ...]: ...
    def after(self, start: Position, num_batches: int) -> Position:
        """The place after the first `num_batches`, where the plan begins at `start`."""

    def batches(self, rank: int) -> Iterator[Rows]:
        """Of a data rank, one a batch that it gets."""

    def indices(self, rank: int) -> Iterator[list[Any]]:
        """Of `batches` what the dataset is asked for, where positions are of no use."""

    def release(self) -> None:
        """Let go of the order, where that takes memory. Only `after` and the numbers are asked for from then on."""


class SamplePlan:
    """Samples of an epoch's order from position `offset` on."""

    def __init__(self, order: EpochOrder, batches: GlobalBatches, *, offset: int) -> None:
        self._order: EpochOrder = order
        self._batches = batches
        self._offset = offset
        self.num_batches = batches.num_batches
        self.num_full = batches.num_full
        self.may_pad = batches.may_pad
        self.has_gaps = False
        self.rows = batches.rows
        self.real_rows = batches.real_rows

    def after(self, start: Position, num_batches: int) -> Position:
        """The cursor moved on."""
        return replace(
            start, batches=start.batches + num_batches, cursor=start.cursor + self._batches.consumed(num_batches)
        )

    def batches(self, rank: int) -> Iterator[Rows]:
        """Of a data rank."""
        batches = self._batches
        first = self._offset + rank * batches.batch_size
        yield from _full(self._order, first, batches.batch_size, step=batches.global_size, num=batches.num_full)
        yield from self._last(rank)

    def indices(self, rank: int) -> Iterator[list[Any]]:
        """Of a data rank, as quickly as can be."""
        batches = self._batches
        first, size = self._offset + rank * batches.batch_size, batches.batch_size
        yield from _full_indices(self._order, first, size, step=batches.global_size, num=batches.num_full)
        for rows in self._last(rank):
            yield rows.indices

    def _last(self, rank: int) -> Iterator[Rows]:
        """The batch that is not full, if there is one in which this rank takes part."""
        batches = self._batches
        if batches.last_size:
            positions = [each + self._offset for each in batches.share(batches.num_full, rank).positions]
            if positions:
                yield Rows(positions, self._order.at(torch.tensor(positions, device="cpu")))

    def release(self) -> None:
        """Let go of the order."""
        self._order = SequentialOrder(0)


class PartedPlan:
    """Samples of one part of a dataset, in an order of its own, beside the parts of other ranks.

    Args:
        order: of the part that this rank reads.
        batches: of all parts.
        parts: who reads which.
    """

    def __init__(self, order: EpochOrder, batches: PartedBatches, parts: Parts) -> None:
        self._order: EpochOrder = order
        self._batches = batches
        self._parts = parts
        self.num_batches = batches.num_batches
        self.num_full = batches.num_full
        self.may_pad = batches.may_pad
        self.has_gaps = False
        self.rows = batches.rows
        self.real_rows = batches.real_rows

    def after(self, start: Position, num_batches: int) -> Position:
        """The cursors of all parts moved on."""
        places = {part: self._batches.consumed(num_batches, part) for part in range(self._parts.num)}
        return replace(
            start,
            batches=start.batches + num_batches,
            cursor=sum(places.values()),
            places=places,
            num_parts=self._parts.num,
        )

    def batches(self, rank: int) -> Iterator[Rows]:
        """Of this rank: the others' parts are not known here."""
        assert rank == self._parts.rank
        size = self._batches.batch_size
        if self.num_full:
            first, step = self._batches.positions(0)[0], size * self._parts.members[self._parts.own]
            yield from _full(self._order, first, size, step=step, num=self.num_full)
        for number in range(self.num_full, self.num_batches):
            positions = self._batches.positions(number)
            if positions:
                yield Rows(positions, self._order.at(torch.tensor(positions, device="cpu")))

    def indices(self, rank: int) -> Iterator[list[Any]]:
        """Those of `batches`."""
        return (rows.indices for rows in self.batches(rank))

    def release(self) -> None:
        """Let go of the order."""
        self._order = SequentialOrder(0)


class BatchPlan:
    """Batches of a batch sampler of the user's, from number `offset` on.

    Args:
        batches: all batches of the epoch.
        offset: how many were handed out before.
        world: number of data ranks.
        even: whether every rank gets a batch in every step.
        split: whether a batch is a global one.
    """

    def __init__(self, batches: Sequence[Sequence[Any]], *, offset: int, world: int, even: bool, split: bool) -> None:
        batches = [batch if isinstance(batch, (list, tuple)) else list(batch) for batch in batches]
        self._groups = BatchGroups(batches[offset:], world=world, even=even, split=split)
        self._starts = list(accumulate((len(batch) for batch in batches), initial=0))[offset:]
        self.num_batches = self._groups.num_batches
        self.num_full = 0
        self.may_pad = self._groups.may_pad
        self.has_gaps = split and not even
        self.rows = self._groups.rows
        self.real_rows = self._groups.real_rows

    def after(self, start: Position, num_batches: int) -> Position:
        """The cursor moved on, in batches of the sampler's."""
        return replace(
            start, batches=start.batches + num_batches, cursor=start.cursor + self._groups.consumed(num_batches)
        )

    def batches(self, rank: int) -> Iterator[Rows]:
        """Of a data rank."""
        for step in range(self.num_batches):
            taken = self._groups.taken(step, rank)
            if taken is not None:
                number, rows = taken
                start, batch = self._starts[number], self._groups.batch(number)
                yield Rows([start + row for row in rows], [batch[row] for row in rows])

    def indices(self, rank: int) -> Iterator[list[Any]]:
        """Those of `batches`."""
        return (rows.indices for rows in self.batches(rank))

    def release(self) -> None:
        """Nothing: where it stands is counted in the sampler's batches."""


def _full(order: EpochOrder, first: int, size: int, *, step: int, num: int) -> Iterator[Rows]:
    """Batches of `size` neighbours, the first at position `first`, each `step` after the one before."""
    position = first
    for indices in _full_indices(order, first, size, step=step, num=num):
        yield Rows(range(position, position + size), indices)
        position += step


def _full_indices(order: EpochOrder, first: int, size: int, *, step: int, num: int) -> Iterator[list[Any]]:
    """What the dataset is asked for in those. Positions are turned into samples many batches at a time."""
    row = torch.arange(size, device="cpu")
    done, chunk = 0, _FIRST_CHUNK
    while done < num:
        count = min(num - done, max(1, chunk // size))
        firsts = torch.arange(count, device="cpu") * step + (first + done * step)
        samples = order.at(firsts.unsqueeze(1) + row)  # (count, size), then flat
        for start in range(0, count * size, size):
            yield samples[start : start + size]
        done, chunk = done + count, min(2 * chunk, _LAST_CHUNK)


class ShardedBatchSampler(Sampler[Any]):
    """What the underlying ``DataLoader`` draws from.

    Each iterator over it keeps to the draws that were set when it was made.
    """

    def __init__(self) -> None:
        self._draws: Iterator[Any] = iter(())
        self._num_batches = 0

    def draw(self, draws: Iterator[Any], num_batches: int) -> None:
        """What the next iterator gives."""
        self._draws, self._num_batches = draws, num_batches

    def __iter__(self) -> Iterator[Any]:
        return self._draws

    def __len__(self) -> int:
        return self._num_batches
