"""What a sharded loader reads: data of known order, or a stream. Each can start an epoch at any place of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from accel_data.batches import BatchGroups, num_groups
from accel_data.epoch import EpochRun, PlannedRun, StreamRun
from accel_data.order import ExplicitOrder, PermutedOrder, SequentialOrder
from accel_data.partition import GlobalBatches
from accel_data.position import DataKey, OrderKind, Position
from accel_data.randomness import worker_seed
from accel_data.sampler import BatchPlan, SamplePlan, ShardedBatchSampler
from accel_data.stream import ShardedStream
from accel_data.user_sampler import check_fingerprint, draw_items
from accel_state.topology import Topology

__all__ = ["BatchSource", "SampleSource", "Source", "StreamSource"]


class Source(Protocol):
    """The data of a loader, sharded."""

    batch_size: int | None
    """Rows of this rank in a full batch; ``None`` where batches differ."""

    def key(self) -> DataKey:
        """What a recorded position has to match."""

    def num_samples(self) -> int | None:
        """Samples of an epoch; ``None`` where that is not known."""

    def num_local_batches(self) -> int | None:
        """Batches of this rank in a whole epoch; ``None`` where that is not known."""

    def begin(self, position: Position) -> EpochRun:
        """Start handing out the rest of an epoch. Every rank must call this."""

    def skipped(self, position: Position, num_batches: int) -> Position:
        """The place after the first `num_batches` global batches of the epoch, or `position` if that is later."""


class SampleSource:
    """Samples of a map-style dataset, in an order that is known by position.

    Args:
        loader: the underlying loader; it draws from `batch_sampler`.
        batch_sampler: whose plan is set for each epoch.
        sampler: the user's; asked for its length, and for its items where `kind` is ``"sampler"``.
        kind: what decides the order.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        batch_sampler: ShardedBatchSampler,
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
        self._loader = loader
        self._batch_sampler = batch_sampler
        self._sampler = sampler
        self._kind: OrderKind = kind
        self._size = batch_size
        self._drop_last = drop_last
        self._even = even
        self._topology = topology
        self._name = name

    def key(self) -> DataKey:
        """Kind and length of the order."""
        return DataKey(kind=self._kind, length=len(self._sampler))

    def num_samples(self) -> int | None:
        """Length of the order."""
        return len(self._sampler)

    def num_local_batches(self) -> int | None:
        """Batches of this rank in a whole epoch."""
        return self._cut(len(self._sampler)).count(self._topology.data_rank)

    def begin(self, position: Position) -> EpochRun:
        """Start at a position. Every rank must call this where the order is a sampler's."""
        order: SequentialOrder | PermutedOrder | ExplicitOrder
        if self._kind == "sequential":
            order = SequentialOrder(len(self._sampler))
        elif self._kind == "permutation":
            order = PermutedOrder(len(self._sampler), seed=position.seed, epoch=position.epoch)
        else:
            items, drawn = draw_items(self._sampler, seed=position.seed, epoch=position.epoch, topology=self._topology)
            check_fingerprint(drawn, position.fingerprint, epoch=position.epoch, name=self._name)
            order, position = ExplicitOrder(items), _with_fingerprint(position, drawn)
        rank = self._topology.data_rank
        batches = self._cut(max(0, len(order) - position.cursor))
        plan = SamplePlan(order, batches, offset=position.cursor, rank=rank)
        self._batch_sampler.plan = plan
        _seed_workers(self._loader, worker_seed(position.seed, position.epoch, rank))
        return PlannedRun(position, plan, iter(self._loader))

    def skipped(self, position: Position, num_batches: int) -> Position:
        """The place after the first batches of the epoch."""
        ahead = num_batches - position.batches
        if ahead <= 0:
            return position
        rest = self._cut(max(0, len(self._sampler) - position.cursor))
        return _moved(position, min(ahead, rest.num_batches), rest.consumed(min(ahead, rest.num_batches)))

    def _cut(self, num_samples: int) -> GlobalBatches:
        return GlobalBatches(
            num_samples=num_samples,
            batch_size=self._size,
            world=self._topology.data_world_size,
            drop_last=self._drop_last,
            even=self._even,
        )


class BatchSource:
    """Batches of a map-style dataset that a batch sampler of the user's makes.

    Args:
        loader: the underlying loader; it draws from `batch_sampler`.
        batch_sampler: whose plan is set for each epoch.
        user_sampler: the user's batch sampler.
        split: whether its batches are global ones, to be cut among the ranks.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        batch_sampler: ShardedBatchSampler,
        *,
        user_sampler: Any,
        split: bool,
        even: bool,
        topology: Topology,
        name: str,
    ) -> None:
        size = getattr(user_sampler, "batch_size", None)
        self.batch_size: int | None = size // topology.data_world_size if split and size is not None else size
        self._loader = loader
        self._batch_sampler = batch_sampler
        self._user_sampler = user_sampler
        self._split = split
        self._even = even
        self._topology = topology
        self._name = name

    def key(self) -> DataKey:
        """Kind of the order and number of the sampler's batches."""
        return DataKey(kind="batch_sampler", length=len(self._user_sampler))

    def num_samples(self) -> int | None:
        """Length of the dataset, which the sampler may use in part or repeatedly."""
        return len(self._loader.dataset)  # type: ignore[arg-type]

    def num_local_batches(self) -> int | None:
        """Batches of this rank in a whole epoch."""
        place = self._topology
        return num_groups(
            len(self._user_sampler), place.data_rank, place.data_world_size, even=self._even, split=self._split
        )

    def begin(self, position: Position) -> EpochRun:
        """Start at a position. Every rank must call this."""
        items, drawn = draw_items(self._user_sampler, seed=position.seed, epoch=position.epoch, topology=self._topology)
        check_fingerprint(drawn, position.fingerprint, epoch=position.epoch, name=self._name)
        position = _with_fingerprint(position, drawn)
        rank, world = self._topology.data_rank, self._topology.data_world_size
        groups = BatchGroups(items[position.cursor :], world=world, even=self._even, split=self._split)
        plan = BatchPlan(groups, rank=rank)
        self._batch_sampler.plan = plan
        _seed_workers(self._loader, worker_seed(position.seed, position.epoch, rank))
        return PlannedRun(position, plan, iter(self._loader))

    def skipped(self, position: Position, num_batches: int) -> Position:
        """The place after the first batches of the epoch."""
        ahead = num_batches - position.batches
        if ahead <= 0:
            return position
        group = 1 if self._split else self._topology.data_world_size
        rest = max(0, len(self._user_sampler) - position.cursor)
        steps = min(ahead, -(-rest // group))
        return _moved(position, steps, min(steps * group, rest))


class StreamSource:
    """Samples of an iterable dataset, which every data rank reads."""

    def __init__(self, loader: DataLoader[Any], stream: ShardedStream, *, batch_size: int, topology: Topology) -> None:
        self.batch_size: int | None = batch_size
        self._loader = loader
        self._stream = stream
        self._size = batch_size
        self._topology = topology
        self._reported = False

    def key(self) -> DataKey:
        """Kind and length of the stream, and how it is divided among workers."""
        workers = self._loader.num_workers
        return DataKey(
            kind="stream", length=self.num_samples(), num_workers=workers, global_size=self._stream.global_size
        )

    def num_samples(self) -> int | None:
        """What the dataset says, if it does."""
        dataset: Any = self._stream.dataset
        return len(dataset) if hasattr(dataset, "__len__") else None

    def num_local_batches(self) -> int | None:
        """From the length that the dataset says; with several workers each may add a partial batch to it."""
        num_samples = self.num_samples()
        if num_samples is None:
            return None
        stream = self._stream
        batches = GlobalBatches(
            num_samples=num_samples,
            batch_size=self._size,
            world=stream.world,
            drop_last=stream.drop_last,
            even=stream.even,
        )
        return batches.count(stream.rank)

    def begin(self, position: Position) -> EpochRun:
        """Start at a position, by reading up to it."""
        stream = self._stream
        stream.start_at(position)
        _seed_workers(self._loader, worker_seed(position.seed, position.epoch, None))
        run = StreamRun(
            position,
            iter(self._loader),
            num_skipped=position.batches if self._loader.num_workers > 1 else 0,
            world=stream.world,
            even=stream.even,
            may_pad=stream.even and not stream.drop_last and stream.world > 1,
            report=self._topology.is_main and not self._reported,
        )
        self._reported = self._reported or position.cursor > 0
        return run

    def skipped(self, position: Position, num_batches: int) -> Position:
        """The place after the first batches of the epoch, all of them full ones."""
        ahead = max(0, num_batches - position.batches)
        return _moved(position, ahead, ahead * self._stream.global_size)


def _with_fingerprint(position: Position, fingerprint: str) -> Position:
    return Position(
        seed=position.seed,
        epoch=position.epoch,
        batches=position.batches,
        cursor=position.cursor,
        fingerprint=fingerprint,
    )


def _moved(position: Position, num_batches: int, samples: int) -> Position:
    return Position(
        seed=position.seed,
        epoch=position.epoch,
        batches=position.batches + num_batches,
        cursor=position.cursor + samples,
        fingerprint=position.fingerprint,
    )


def _seed_workers(loader: DataLoader[Any], seed: int) -> None:
    """The underlying loader draws its workers' base seed from its generator when an iterator is made."""
    generator = loader.generator
    assert isinstance(generator, torch.Generator)
    generator.manual_seed(seed)
