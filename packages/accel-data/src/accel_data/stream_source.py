"""An iterable dataset as a source: its parts, who reads which, and an epoch of it from any place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from accel_data.assembly import Assembly, PartReader, SizeExchange
from accel_data.collation import Collation
from accel_data.dispatch import DispatchedSteps
from accel_data.epoch import EpochRun, Note, StreamRun
from accel_data.hugging_face import divides_badly, loses_buffer
from accel_data.order import derive_seed
from accel_data.partition import GlobalBatches
from accel_data.parts import Parts
from accel_data.position import DataKey, PartPlace, Position
from accel_data.randomness import collating_seed, worker_seed
from accel_data.stream import PartStream
from accel_state.errors import ConfigError
from accel_state.topology import Topology

__all__ = ["StreamSource"]

_logger = logging.getLogger(__name__)


class _Key(NamedTuple):
    num_parts: int
    part: int
    together: bool
    even: bool


class _Open(NamedTuple):
    stream: PartStream
    loader: DataLoader[Any]


class StreamSource:
    """Samples of an iterable dataset.

    Args:
        dataset: the user's.
        divide: gives part `part` of `num_parts` of it.
        build: makes the underlying loader of a part.
        collation: makes a batch of a list of samples.
        parts: who reads which.
        batch_size: rows of one rank in a full batch.
        stateful: whether states of datasets are used.
        exchange: how ranks learn of parts that others read; ``None`` where all are read here.
        dealt: how rank 0 hands out what it reads, if it alone does.
        fixed: whether each rank has its own part and nobody else's.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        divide: Callable[[int, int], Any],
        build: Callable[[PartStream], DataLoader[Any]],
        collation: Collation,
        parts: Parts,
        batch_size: int,
        drop_last: bool,
        even: bool,
        stateful: bool,
        exchange: SizeExchange | None,
        dealt: DispatchedSteps | None,
        topology: Topology,
        num_workers: int,
        persistent: bool,
        fixed: bool,
        name: str,
    ) -> None:
        self.batch_size: int | None = batch_size
        self.even = even
        self._dataset = dataset
        self._divide = divide
        self._build = build
        self._collation = collation
        self._parts = parts
        self._size = batch_size
        self._drop_last = drop_last
        self._stateful = stateful and not loses_buffer(dataset) and not (num_workers and divides_badly(dataset))
        self._exchange = exchange
        self._dealt = dealt
        self._topology = topology
        self._num_workers = max(1, num_workers)
        self._persistent = persistent
        self._fixed = fixed
        self._name = name
        self._opened: dict[_Key, _Open] = {}
        self._said: set[str] = set()

    def key(self) -> DataKey:
        """How the stream is divided among workers. Its length is no matter: it ends where it ends."""
        return DataKey(kind="stream", length=None, num_workers=self._num_workers)

    def num_samples(self) -> int | None:
        """What the dataset says, if it does; of parts that the user gives, nobody knows."""
        return len(self._dataset) if hasattr(self._dataset, "__len__") and self._parts.num == 1 else None

    def num_local_batches(self) -> int | None:
        """From the length that the dataset says; with several workers each may add a partial batch to it."""
        num_samples = self.num_samples()
        if num_samples is None:
            return None
        world = self._topology.data_world_size
        batches = GlobalBatches(
            num_samples=num_samples, batch_size=self._size, world=world, drop_last=self._drop_last, even=self.even
        )
        return batches.count(self._topology.data_rank)

    def begin(self, position: Position, *, skip: int = 0) -> EpochRun:
        """Start at a position: from the dataset's own state, else by reading up to it."""
        may_pad = self.even and not self._drop_last and self._topology.data_world_size > 1
        ahead = max(0, skip - position.batches)
        if self._dealt is not None and not self._topology.is_main:
            return StreamRun(position, self._dealt.take(), may_pad=may_pad)
        parts = self._regrouped(position)
        together = parts is not self._parts or parts.num == 1
        readers = self._readers(position, parts, together=together, ahead=ahead)
        assembly = Assembly(
            readers,
            parts,
            rank=self._topology.data_rank,
            world=self._topology.data_world_size,
            batch_size=self._size,
            even=self.even,
            drop_last=self._drop_last,
            collate=_CollateStep(self._collation, position, self._topology.data_world_size),
            exchange=None if together else self._exchange,
            together=together,
            deal=self._dealt is not None,
            ahead=ahead,
        )
        skipped = ahead * self._size * self._topology.data_world_size
        steps = self._timed(assembly.steps(), self._num_again(position) + skipped, position.cursor + skipped, ahead)
        if self._dealt is None:
            return StreamRun(position, steps, may_pad=may_pad)
        return StreamRun(position, self._dealt.deal(self._for_each(steps)), may_pad=may_pad)

    def whole(self, position: Position) -> Position:
        """The position with the places of all parts. Every rank must call this: each knows its own part only."""
        places = position.places
        if places is None or self._exchange is None or len(places) == position.num_parts:
            return position
        return replace(position, places=self._exchange.gather(places[self._parts.own]))

    def close(self) -> None:
        """Give up process groups, and the workers of this rank."""
        self._opened.clear()
        if self._exchange is not None:
            self._exchange.close()
        if self._dealt is not None:
            self._dealt.close()

    def _regrouped(self, position: Position) -> Parts:
        """Who reads which part in the rest of the epoch: those who did, or everyone all of them."""
        if position.places is None or position.num_parts == self._parts.num:
            return self._parts
        num, world = position.num_parts, self._topology.data_world_size
        if self._fixed:
            raise ConfigError(
                f"The state for {self._name} was written by {num} data ranks, each with a part of its own, and there "
                f"are {world} now: which of them holds the rest of which part is not known. Start as many as before, "
                f'or divide the data by a function instead of `sharding="given"`.'
            )
        if self._size * world % num:
            raise ConfigError(
                f"The state for {self._name} was written with the stream in {num} parts, and a global batch has "
                f"{self._size * world} samples now, which {num} parts cannot give in equal numbers. "
                f"Choose a batch size that makes the global batch a multiple of {num}, best the one of before."
            )
        self._say(
            "parts",
            f"The epoch in progress was begun with the stream in {num} part(s), and {world} data rank(s) go on with "
            f"it: so that every step holds the samples it would have held, each rank reads all of them up to the end "
            f"of this epoch.",
        )
        return Parts(tuple(range(num)), 0)

    def _readers(self, position: Position, parts: Parts, *, together: bool, ahead: int) -> dict[int, PartReader]:
        alone = not together and self._exchange is not None
        numbers = [parts.own] if alone else range(parts.num)
        keys = [_Key(parts.num, part, together, self.even) for part in numbers]
        for key in set(self._opened).difference(keys):
            del self._opened[key]
        readers = {}
        for key in keys:
            part = key.part
            place = None if position.places is None else position.places.get(part)
            assert place is None or isinstance(place, PartPlace)
            opened = self._open(key, parts, anew=place is not None or ahead > 0)
            opened.stream.start_at(position.seed, position.epoch, place, ahead=ahead)
            generator = opened.loader.generator
            assert isinstance(generator, torch.Generator)
            generator.manual_seed(worker_seed(position.seed, position.epoch, part))
            readers[part] = PartReader(iter(opened.loader), place, num_workers=self._num_workers)
        return readers

    def _open(self, key: _Key, parts: Parts, *, anew: bool) -> _Open:
        """The stream and loader of a part. Workers that live on are replaced where they have to go to a place."""
        num, part, together, even = key
        if key in self._opened and not (anew and self._persistent):
            return self._opened[key]
        world, rank = self._topology.data_world_size, self._topology.data_rank
        size = self._size * world // num if together else self._size * parts.members[part]
        collate: _CollateOwn | _CollateEach | None = None
        if self._dealt is not None and num == 1:
            collate = _CollateEach(self._collation, self._size)
        elif self._dealt is None and together and num == 1:
            collate = _CollateOwn(self._collation, rank * self._size, self._size)
        elif not together and part == parts.own:
            collate = _CollateOwn(self._collation, parts.index * self._size, self._size)
        stream = PartStream(
            self._dataset if num == 1 else self._divide(num, part),
            collate=collate,
            size=size,
            part=part,
            drop_last=self._drop_last,
            num_first=self._size if num > 1 and even and not together else 0,
            stateful=self._stateful,
            rank=rank,
            name=self._name,
        )
        if self._persistent:
            stream.share_memory()
        self._opened[key] = _Open(stream, self._build(stream))
        return self._opened[key]

    def _for_each(self, steps: Iterator[tuple[Any, Note]]) -> Iterator[list[tuple[Any, Note]]]:
        world = self._topology.data_world_size
        for batches, note in steps:
            yield [(None if batches is None else batches[rank], note) for rank in range(world)]

    def _num_again(self, position: Position) -> int:
        """Samples that are read again since no state of the dataset leads past them."""
        places = (place for place in (position.places or {}).values() if isinstance(place, PartPlace))
        workers = (worker for place in places for worker in place.workers if not worker.ended)
        return sum(worker.samples - worker.at for worker in workers)

    def _timed(self, steps: Iterator[tuple[Any, Note]], num_again: int, cursor: int, ahead: int) -> Iterator[Any]:
        began = time.perf_counter()
        for number, step in enumerate(steps):
            if number == ahead and num_again:
                seconds = time.perf_counter() - began
                why = ": its state leaves out what its shuffle buffer holds" if loses_buffer(self._dataset) else ""
                self._say(
                    "again",
                    f"Going on at sample {cursor} of the iterable dataset of the {self._name}: {num_again} samples "
                    f"before were read again and dropped, uncollated, in {seconds:.1f} s "
                    f"({num_again / max(seconds, 1e-9):.0f} a second){why}.",
                )
            yield step

    def _say(self, what: str, message: str) -> None:
        if self._topology.is_main and what not in self._said:
            _logger.warning("%s", message)
        self._said.add(what)


class _CollateStep:
    """Collates the rows of one rank in a step that is not full."""

    def __init__(self, collation: Collation, start: Position, world: int) -> None:
        self._collation = collation
        self._seed = derive_seed(start.seed, start.epoch)
        self._first = start.batches
        self._world = world

    def __call__(self, rows: list[Any], step: int, rank: int) -> Any:
        return self._collation.seeded(rows, collating_seed(self._seed, (self._first + step) * self._world + rank))


class _CollateOwn:
    """Collates the rows of one rank in a full batch."""

    def __init__(self, collation: Collation, first: int, count: int) -> None:
        self._collation = collation
        self._rows = slice(first, first + count)

    def __call__(self, samples: list[Any], seed: int, number: int) -> Any:
        return self._collation.seeded(samples[self._rows], collating_seed(seed, number + self._rows.start))


class _CollateEach:
    """Collates the rows of every rank in a full batch: a list of batches."""

    def __init__(self, collation: Collation, count: int) -> None:
        self._collation = collation
        self._count = count

    def __call__(self, samples: list[Any], seed: int, number: int) -> list[Any]:
        return [
            self._collation.seeded(samples[start : start + self._count], collating_seed(seed, number + start))
            for start in range(0, len(samples), self._count)
        ]
