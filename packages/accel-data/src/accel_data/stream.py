"""Sharding of iterable datasets: every data rank reads the stream and keeps its part of each global batch.

Batches are made here, not by the DataLoader, so that each comes with the number of real samples that the whole
world has in that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from accel_data.partition import share_of
from accel_data.position import Position
from accel_data.randomness import AsideGenerators, reading_seed

__all__ = ["Parcel", "ShardedStream", "StreamWorkerInit", "hand_over"]

Parcel = tuple[int, Any]
"""Real samples of the global batch, and this rank's batch; ``None`` where it gets none or the batch is skipped."""

_SKIP_CHUNK = 1024  # samples read at a time while skipping


class ShardedStream(IterableDataset[Parcel]):
    """Cuts the stream of a dataset into global batches and collates this rank's part of each.

    With several workers each reads its own part of the stream, as the dataset divides it, and cuts that into
    global batches; the last one of each worker may be partial.

    Args:
        dataset: any iterable dataset. The same stream must come on all ranks; it is read under generators
            seeded alike, and told the epoch by ``set_epoch`` where it has that.
        collate: makes a batch of a list of samples.
        batch_size: rows of this rank in a full global batch.
        world: number of data ranks.
        rank: this data rank.
        drop_last: whether a partial global batch is left out.
        even: whether all ranks get as many rows of a partial global batch, by padding it.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        world: int,
        rank: int,
        drop_last: bool,
        even: bool,
    ) -> None:
        self.dataset = dataset
        self.world = world
        self.rank = rank
        self.even = even
        self.drop_last = drop_last
        self.global_size = batch_size * world
        self._collate = collate
        self._start = torch.zeros(4, dtype=torch.int64)

    def share_memory(self) -> None:
        """Let workers that live on see where the next epoch starts. Called before any is started."""
        self._start.share_memory_()  # type: ignore[no-untyped-call]

    def start_at(self, position: Position) -> None:
        """Where the next iteration starts, in this process and in workers that hold a copy of this."""
        self._start.copy_(torch.tensor([position.seed, position.epoch, position.cursor, position.batches]))
        self._tell_epoch(position.epoch)

    def __iter__(self) -> Iterator[Parcel]:
        seed, epoch, cursor, batches = self._start.tolist()
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            self._tell_epoch(epoch)
        generators = AsideGenerators(reading_seed(seed, epoch, worker))
        with generators:
            samples = iter(self.dataset)

        def read(count: int) -> list[Any]:
            with generators:
                return list(islice(samples, count))

        if num_workers == 1:
            _discard(read, cursor)
        else:
            # Of the first `batches` of all workers in turn, this one made at least so many (more, if another
            # had ended by then: those are dropped by the reader). They are counted, not collated.
            for _ in range(-(-max(0, batches - worker) // num_workers)):
                yield len(read(self.global_size)), None
        yield from self._cut(read)

    def _cut(self, read: Callable[[int], list[Any]]) -> Iterator[Parcel]:
        while samples := read(self.global_size):
            size = len(samples)
            if size < self.global_size and self.drop_last:
                return
            rows = share_of(size, self.rank, self.world, even=self.even).positions
            yield size, self._collate([samples[row] for row in rows]) if rows else None

    def _tell_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


class StreamWorkerInit:
    """Shows the user's dataset, not ours around it, to ``get_worker_info()`` in a worker; then calls theirs."""

    def __init__(self, user_init: Callable[[int], None] | None) -> None:
        self._user_init = user_init

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        assert info is not None
        # The record is frozen. It belongs to this worker alone, and the loader itself keeps another reference.
        stream: Any = info.dataset
        object.__setattr__(info, "dataset", stream.dataset)
        if self._user_init is not None:
            self._user_init(worker_id)


def hand_over(parcel: Parcel) -> Parcel:
    """Collation of the underlying DataLoader: batches are made already."""
    return parcel


def _discard(read: Callable[[int], list[Any]], count: int) -> None:
    while count > 0:
        if not read(min(count, _SKIP_CHUNK)):
            return
        count -= _SKIP_CHUNK
