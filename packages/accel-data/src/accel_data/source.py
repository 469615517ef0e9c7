"""What a sharded loader reads. Each kind of data can start an epoch at any place of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from accel_data.agreement import has_peers, share
from accel_data.batches import num_groups
from accel_data.dispatch import DispatchedSteps
from accel_data.epoch import EpochRun, PlannedRun
from accel_data.order import EpochOrder, ExplicitOrder, PermutedOrder, SequentialOrder, derive_seed
from accel_data.partition import GlobalBatches
from accel_data.parts import PartedBatches, Parts
from accel_data.position import DataKey, OrderKind, Position
from accel_data.randomness import augmentation_seed, worker_seed
from accel_data.reading import Ticket
from accel_data.sampler import BatchPlan, EpochPlan, PartedPlan, SamplePlan, ShardedBatchSampler
from accel_data.user_sampler import check_fingerprint, draw_items
from accel_state.errors import ConfigError
from accel_state.topology import Topology

__all__ = ["BatchSource", "Feed", "PartedSource", "SampleSource", "Source"]


class Source(Protocol):
    """The data of a loader, sharded."""

    batch_size: int | None
    """Rows of this rank in a full batch; ``None`` where batches differ."""
    even: bool
    """Whether every rank gets as many batches; takes effect when an epoch is started."""

    def key(self) -> DataKey:
        """What a recorded position has to match."""

    def num_samples(self) -> int | None:
        """Samples of an epoch; ``None`` where that is not known."""

    def num_local_batches(self) -> int | None:
        """Batches of this rank in a whole epoch; ``None`` where that is not known."""

    def begin(self, position: Position, *, skip: int = 0) -> EpochRun:
        """Start handing out the rest of an epoch. Every rank must call this.

        Args:
            position: where.
            skip: global batches at the front of the epoch that are left out if `position` is before their end.
        """

    def whole(self, position: Position) -> Position:
        """The position with the places of all parts. Every rank must call this."""

    def close(self) -> None:
        """Give up process groups."""


class Feed:
    """Turns a plan into this rank's batches, by way of the underlying DataLoader.

    Args:
        loader: draws from `batch_sampler`.
        batch_sampler: whose draws are set for each epoch.
        ticketed: whether its dataset takes tickets.
        single: whether the loader has ``batch_size=None``, so that it draws one index at a time.
        topology: this rank's place.
        dealt: how rank 0 hands out what it reads, if it alone does.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        batch_sampler: ShardedBatchSampler,
        *,
        ticketed: bool,
        single: bool,
        topology: Topology,
        dealt: DispatchedSteps | None,
    ) -> None:
        self._loader = loader
        self._batch_sampler = batch_sampler
        self._ticketed = ticketed
        self._single = single
        self._topology = topology
        self._dealt = dealt

    def batches(self, plan: EpochPlan, position: Position, *, part: int = 0) -> Iterable[Any]:
        """This rank's batches; ``None`` for a step in which it gets none, where rank 0 deals."""
        topology, dealt = self._topology, self._dealt
        if dealt is not None and not topology.is_main:
            return dealt.take()
        generator = self._loader.generator
        assert isinstance(generator, torch.Generator)
        # The loader draws its workers' base seed from there when an iterator is made.
        generator.manual_seed(worker_seed(position.seed, position.epoch, topology.data_rank))
        seed = augmentation_seed(derive_seed(position.seed, part) if part else position.seed, position.epoch)
        if dealt is None:
            self._batch_sampler.draw(self._draws(plan, topology.data_rank, seed), plan.num_batches)
            batches = self._iterator()
            return batches if not plan.has_gaps else _with_gaps(batches, plan, topology.data_rank)
        draws = [self._draws(plan, rank, seed) for rank in range(topology.data_world_size)]
        in_turns = (next(draws[rank]) for step in range(plan.num_batches) for rank in _served(plan, step))
        self._batch_sampler.draw(in_turns, plan.num_batches * topology.data_world_size)
        return dealt.deal(_grouped(self._iterator(), plan))

    def close(self) -> None:
        """Give up the channel."""
        if self._dealt is not None:
            self._dealt.close()

    def _iterator(self) -> Iterator[Any]:
        with torch.device("cpu"):  # where the loader's generator is
            return iter(self._loader)

    def _draws(self, plan: EpochPlan, rank: int, seed: int) -> Iterator[Any]:
        if self._ticketed:
            return (Ticket(seed, rows.positions, rows.indices) for rows in plan.batches(rank))
        if self._single:
            return (indices[0] for indices in plan.indices(rank))
        return plan.indices(rank)


class SampleSource:
    """Samples of a map-style dataset, in an order that is known by position.

    Args:
        feed: gives the batches.
        sampler: the user's; asked for its length, and for its items where `kind` is ``"sampler"``.
        kind: what decides the order.
        batch_size: rows of this rank in a full batch.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        sampler: Any,
        kind: OrderKind,
        batch_size: int,
        drop_last: bool,
        even: bool,
        topology: Topology,
        name: str,
    ) -> None:
        self.batch_size: int | None = batch_size
        self.even = even
        self._feed = feed
        self._sampler = sampler
        self._kind: OrderKind = kind
        self._size = batch_size
        self._drop_last = drop_last
        self._topology = topology
        self._name = name
        self._length = len(sampler)

    def key(self) -> DataKey:
        """Kind and length of the order. A sampler of the user's may give another number each epoch."""
        return DataKey(kind=self._kind, length=None if self._kind == "sampler" else self._checked_length())

    def num_samples(self) -> int | None:
        """Length of the order."""
        return len(self._sampler)

    def num_local_batches(self) -> int | None:
        """Batches of this rank in a whole epoch."""
        return self._cut(len(self._sampler)).count(self._topology.data_rank)

    def begin(self, position: Position, *, skip: int = 0) -> EpochRun:
        """Start at a position. Every rank must call this where the order is a sampler's."""
        order, position = self._order(position)
        position, plan = _skipped(position, skip, lambda place: self._plan(order, place))
        batches = self._feed.batches(plan, position)
        return PlannedRun(position, plan, batches, rank=self._topology.data_rank, name=self._name)

    def whole(self, position: Position) -> Position:
        """The position: there is one part."""
        return position

    def close(self) -> None:
        """Give up process groups."""
        self._feed.close()

    def _order(self, position: Position) -> tuple[EpochOrder, Position]:
        if self._kind == "sequential":
            return SequentialOrder(self._checked_length()), position
        if self._kind == "permutation":
            return PermutedOrder(self._checked_length(), seed=position.seed, epoch=position.epoch), position
        items, position = _drawn(self._sampler, position, self._topology, self._name)
        return ExplicitOrder(items), position

    def _plan(self, order: EpochOrder, position: Position) -> SamplePlan:
        return SamplePlan(order, self._cut(max(0, len(order) - position.cursor)), offset=position.cursor)

    def _cut(self, num_samples: int) -> GlobalBatches:
        return GlobalBatches(
            num_samples=num_samples,
            batch_size=self._size,
            world=self._topology.data_world_size,
            drop_last=self._drop_last,
            even=self.even,
        )

    def _checked_length(self) -> int:
        length = len(self._sampler)
        if length != self._length:
            raise _grown(self._name, self._length, length)
        return length


class PartedSource:
    """A map-style dataset in parts, each read by some of the ranks in an order of its own.

    Args:
        feed: gives the batches of this rank's part.
        sampler: of this rank's part; asked for its length, and for its items where `kind` is ``"sampler"``.
        kind: what decides the order.
        batch_size: rows of this rank in a full batch.
        lengths: samples of each part.
        parts: who reads which.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        sampler: Any,
        kind: OrderKind,
        batch_size: int,
        drop_last: bool,
        even: bool,
        lengths: Sequence[int],
        parts: Parts,
        topology: Topology,
        name: str,
    ) -> None:
        self.batch_size: int | None = batch_size
        self.even = even
        self._feed = feed
        self._sampler = sampler
        self._kind: OrderKind = kind
        self._size = batch_size
        self._drop_last = drop_last
        self._lengths = lengths
        self._parts = parts
        self._topology = topology
        self._name = name

    def key(self) -> DataKey:
        """Kind and length of the order, and the number of parts."""
        return DataKey(kind=self._kind, length=sum(self._lengths), num_parts=self._parts.num)

    def num_samples(self) -> int | None:
        """Those of all parts."""
        return sum(self._lengths)

    def num_local_batches(self) -> int | None:
        """Batches of this rank in a whole epoch."""
        return self._cut([0] * self._parts.num).count()

    def begin(self, position: Position, *, skip: int = 0) -> EpochRun:
        """Start at a position. Every rank must call this where the order is a sampler's."""
        order, position = self._order(position)
        if len(order) != self._lengths[self._parts.own]:
            raise _grown(self._name, self._lengths[self._parts.own], len(order))
        position, plan = _skipped(position, skip, lambda place: self._plan(order, place))
        batches = self._feed.batches(plan, position, part=self._parts.own)
        return PlannedRun(position, plan, batches, rank=self._parts.rank, name=self._name)

    def whole(self, position: Position) -> Position:
        """The position: every rank knows all places."""
        return position

    def close(self) -> None:
        """Give up process groups."""
        self._feed.close()

    def _order(self, position: Position) -> tuple[EpochOrder, Position]:
        seed = derive_seed(position.seed, self._parts.own)
        if self._kind == "sequential":
            return SequentialOrder(len(self._sampler)), position
        if self._kind == "permutation":
            return PermutedOrder(len(self._sampler), seed=seed, epoch=position.epoch), position
        items, drawn = draw_items(
            self._sampler,
            seed=seed,
            epoch=position.epoch,
            topology=self._topology,
            name=self._name,
            alone=True,
        )
        if not has_peers(self._topology):
            return ExplicitOrder(items), position
        drawn = "/".join(share(drawn, self._topology))  # of all ranks, so that the record is one
        check_fingerprint(drawn, position.fingerprint, epoch=position.epoch, name=self._name)
        return ExplicitOrder(items), replace(position, fingerprint=drawn)

    def _plan(self, order: EpochOrder, position: Position) -> PartedPlan:
        starts = [0] * self._parts.num
        for part, start in (position.places or {}).items():
            assert isinstance(start, int)
            starts[part] = start
        return PartedPlan(order, self._cut(starts), self._parts)

    def _cut(self, starts: Sequence[int]) -> PartedBatches:
        return PartedBatches(
            self._lengths,
            starts,
            self._parts,
            batch_size=self._size,
            drop_last=self._drop_last,
            even=self.even,
        )


class BatchSource:
    """Batches of a map-style dataset that a batch sampler of the user's makes.

    Args:
        feed: gives the batches.
        user_sampler: the user's batch sampler.
        num_samples: those of the dataset.
        split: whether its batches are global ones, to be cut among the ranks.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        user_sampler: Any,
        num_samples: Callable[[], int],
        split: bool,
        even: bool,
        topology: Topology,
        name: str,
    ) -> None:
        size = getattr(user_sampler, "batch_size", None)
        if split and size is not None:  # batches that the ranks do not divide have no size in common
            size = None if size % topology.data_world_size else size // topology.data_world_size
        self.batch_size: int | None = size
        self.even = even
        self._feed = feed
        self._user_sampler = user_sampler
        self._num_samples = num_samples
        self._split = split
        self._topology = topology
        self._name = name

    def key(self) -> DataKey:
        """Kind of the order. The sampler may give another number of batches each epoch."""
        return DataKey(kind="batch_sampler", length=None)

    def num_samples(self) -> int | None:
        """Length of the dataset, which the sampler may use in part or repeatedly."""
        return self._num_samples()

    def num_local_batches(self) -> int | None:
        """Batches of this rank in a whole epoch."""
        place = self._topology
        return num_groups(
            len(self._user_sampler), place.data_rank, place.data_world_size, even=self.even, split=self._split
        )

    def begin(self, position: Position, *, skip: int = 0) -> EpochRun:
        """Start at a position. Every rank must call this."""
        items, position = _drawn(self._user_sampler, position, self._topology, self._name)
        position, plan = _skipped(position, skip, lambda place: self._plan(items, place))
        batches = self._feed.batches(plan, position)
        return PlannedRun(position, plan, batches, rank=self._topology.data_rank, name=self._name)

    def whole(self, position: Position) -> Position:
        """The position: there is one part."""
        return position

    def close(self) -> None:
        """Give up process groups."""
        self._feed.close()

    def _plan(self, items: Sequence[Any], position: Position) -> BatchPlan:
        world = self._topology.data_world_size
        return BatchPlan(items, offset=position.cursor, world=world, even=self.even, split=self._split)


def _skipped(position: Position, skip: int, plan_at: Callable[[Position], EpochPlan]) -> tuple[Position, EpochPlan]:
    """The place after the first `skip` batches of the epoch, or `position` if that is later; and what follows it."""
    plan = plan_at(position)
    ahead = min(max(0, skip - position.batches), plan.num_batches)
    if not ahead:
        return position, plan
    position = plan.after(position, ahead)
    return position, plan_at(position)


def _drawn(sampler: Any, position: Position, topology: Topology, name: str) -> tuple[Sequence[Any], Position]:
    """What a sampler of the user's gives in the epoch of `position`, which is that of the same order."""
    items, drawn = draw_items(sampler, seed=position.seed, epoch=position.epoch, topology=topology, name=name)
    check_fingerprint(drawn, position.fingerprint, epoch=position.epoch, name=name)
    return items, replace(position, fingerprint=drawn)


def _served(plan: EpochPlan, step: int) -> list[int]:
    """Data ranks that get rows in a step."""
    return [rank for rank, rows in enumerate(plan.rows(step)) if rows]


def _grouped(batches: Iterator[Any], plan: EpochPlan) -> Iterator[list[Any]]:
    """Of each step a list with the batch of every data rank."""
    for step in range(plan.num_batches):
        served = _served(plan, step)
        group: list[Any] = [None] * len(plan.rows(step))
        for rank in served:
            group[rank] = next(batches)
        yield group


def _with_gaps(batches: Iterator[Any], plan: EpochPlan, rank: int) -> Iterator[Any]:
    """A batch a step; ``None`` where the rank gets no rows."""
    for step in range(plan.num_batches):
        yield next(batches) if plan.rows(step)[rank] else None
    yield from batches  # nothing: workers that live on are told in this way that the epoch is over


def _grown(name: str, before: int, now: int) -> ConfigError:
    return ConfigError(
        f"The dataset of the {name} had {before} samples when it was prepared, and has {now} now: ranks that saw it at "
        f"different lengths would read different orders. Prepare the loader anew after changing the dataset."
    )
