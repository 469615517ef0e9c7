"""From the parcels of a stream's parts to this rank's batches: which rows are whose, step by step.

A rank reads its own part and is told by the others how many samples theirs gave; that is known one step before it is
needed. Where the parts are as many as when the epoch began but the ranks are others, every rank reads all parts and
takes its slice of what they give together, so that each step holds the samples it would have held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from accel_data.epoch import Note
from accel_data.partition import share_of, split_real_rows, split_rows
from accel_data.parts import Parts
from accel_data.position import PartPlace, WorkerPlace
from accel_data.stream import Parcel
from accel_state.errors import CollectiveError, ConfigError
from accel_state.process import close_group

__all__ = ["Assembly", "PartReader", "SizeExchange"]

_FAILED = -(1 << 40)  # below zero whatever is added to it
_Sizes = Callable[[], Sequence[int]]


class PartReader:
    """The batches of one part, in order, and where it stands.

    Args:
        parcels: what the underlying loader gives.
        place: where it begins; ``None`` at the beginning of an epoch.
        num_workers: at least 1.
    """

    def __init__(self, parcels: Iterator[Parcel], place: PartPlace | None, *, num_workers: int) -> None:
        self.first: list[Any] | None = None
        """First samples of the part, once it is over and they were asked for."""
        self._parcels = parcels
        self._workers = [WorkerPlace()] * num_workers if place is None else list(place.workers)
        self._turn = 0 if place is None else place.turn

    @property
    def place(self) -> PartPlace:
        """After the last batch that was given."""
        return PartPlace(self._turn, tuple(self._workers))

    def next(self) -> Parcel | None:
        """The next batch; ``None`` once the part is over."""
        for parcel in self._parcels:
            if parcel.size < 0:
                continue
            self._workers[parcel.worker] = parcel.place
            if parcel.size == 0:
                self.first = parcel.samples or self.first
                continue
            self._turn = (parcel.worker + 1) % len(self._workers)
            return parcel
        return None


class SizeExchange:
    """Tells all ranks how many samples each part gives in a step, without waiting for the answer.

    Every rank must make it, and call it in every step. It has a process group of its own on the host, so it neither
    waits for an accelerator nor mixes with the collectives of the training. Each size comes with the number of the
    iteration and of the step that it belongs to, so loops that have parted are noticed.

    Args:
        parts: who reads which.
        speaks: whether this rank is the one that speaks for its part.
        name: how the loader is called in errors.
    """

    def __init__(self, parts: Parts, *, speaks: bool, name: str) -> None:
        self._parts = parts
        self._speaks = speaks
        self._name = name
        self._group = dist.new_group(backend="gloo")
        self._iteration = 0
        self._step = 0

    def begin(self) -> None:
        """A new iteration."""
        self._iteration, self._step = self._iteration + 1, 0

    def __call__(self, size: int) -> _Sizes:
        """Start telling; the result waits and gives the sizes of all parts.

        Args:
            size: samples of this rank's part; `_FAILED` if it could not be read.
        """
        self._step += 1
        own = torch.tensor([size, self._iteration, self._step], device="cpu")
        told = torch.zeros(self._parts.num, 3, dtype=torch.int64, device="cpu")
        if self._speaks:
            told[self._parts.own] = own
        elif size == _FAILED:
            told[self._parts.own, 0] = size  # on top of what the speaker has read
        work: Any = dist.all_reduce(told, group=self._group, async_op=True)

        def wait() -> Sequence[int]:
            try:
                work.wait()
            except RuntimeError as error:
                raise CollectiveError(
                    f"Data rank {self._parts.rank} waited to hear how much the other parts of the {self._name} give, "
                    f"and lost the connection ({error}). A process has ended, and cannot be gone on without: look for "
                    f"the first error of the others."
                ) from error
            self._check(told, own)
            return told[:, 0].tolist()

        return wait

    def _check(self, told: torch.Tensor, own: torch.Tensor) -> None:
        failed = (told[:, 0] < 0).nonzero().flatten().tolist()
        if failed and own[0] != _FAILED:
            raise CollectiveError(
                f"Part {failed[0]} of the {self._name} could not be read by its rank, so no step can be made of what "
                f"the others have. That rank tells why: mend the data, and go on from the last checkpoint."
            )
        if not failed and not (told[:, 1:] == own[1:]).all():
            places = ", ".join(f"{iteration}.{step}" for iteration, step in told[:, 1:].tolist())
            raise CollectiveError(
                f"The ranks that read the parts of the {self._name} are at different places: iteration.step "
                f"{places}. Their loops were left at different batches, so nothing that follows would fit together. "
                f"Leave them at the same one on every rank."
            )

    def close(self) -> None:
        """Give up the group. Every rank should, between iterations."""
        close_group(self._group)

    def gather(self, value: Any) -> dict[int, Any]:
        """What the speaker of each part holds. Every rank must call this."""
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, (self._parts.own, value) if self._speaks else None, group=self._group)
        return dict(each for each in values if each is not None)


class Assembly:
    """The steps of the rest of an epoch, as this rank sees them.

    Args:
        readers: of the parts that are read here, by number.
        parts: who reads which, as when the epoch began.
        rank: this data rank.
        world: number of data ranks.
        batch_size: rows of one rank in a full batch.
        even: whether a step that is not full is padded.
        drop_last: whether it is left out; the readers leave out partial batches themselves.
        collate: makes a batch of a list of samples, told the number of the step and the data rank it is for.
        exchange: how the sizes of parts that are not read here are learnt.
        together: whether all parts are cut as one, instead of each among its own ranks.
        deal: whether batches of all ranks are made, instead of this one's: each step is a list of them.
        ahead: steps at the front that are left out.
    """

    def __init__(
        self,
        readers: Mapping[int, PartReader],
        parts: Parts,
        *,
        rank: int,
        world: int,
        batch_size: int,
        even: bool,
        drop_last: bool,
        collate: Callable[[list[Any], int, int], Any],
        exchange: SizeExchange | None,
        together: bool,
        deal: bool,
        ahead: int,
    ) -> None:
        self._readers = readers
        self._parts = parts
        self._rank = rank
        self._world = world
        self._even = even
        self._drop_last = drop_last
        self._collate = collate
        self._exchange = exchange
        self._deal = deal
        self._together = together
        self._ahead = ahead
        self._full = (batch_size,) * world
        members = [world / parts.num] * parts.num if together else parts.members
        self._full_sizes = [round(batch_size * each) for each in members]

    def steps(self) -> Iterator[tuple[Any, Note]]:
        """Batches with what is known of their step; ``None`` for one in which this rank has no part."""
        if self._exchange is not None:
            self._exchange.begin()
        pulled = deque(self._pull() for _ in range(2 if self._exchange is None else 3))
        sizes = pulled[0][1]()
        step = 0
        while not self._is_over(sizes):
            parcels, _, places = pulled.popleft()
            following = pulled[0][1]()
            rows, real_rows = self._rows(sizes)
            is_last = self._is_over(following)
            if is_last:
                # What a dataset says of itself at its end may be the place where it begins.
                places = {part: place.at_end() for part, place in places.items()}
            note = Note(rows, real_rows, is_last, places, self._parts.num)
            yield self._batch(parcels, rows, step) if step >= self._ahead else None, note
            sizes, step = following, step + 1
            pulled.append(self._pull())

    def _pull(self) -> tuple[dict[int, Parcel | None], _Sizes, dict[int, PartPlace]]:
        try:
            parcels = {part: reader.next() for part, reader in self._readers.items()}
        except Exception:
            if self._exchange is not None:
                self._exchange(_FAILED)
            raise
        places = {part: reader.place for part, reader in self._readers.items()}
        own = {part: 0 if parcel is None else parcel.size for part, parcel in parcels.items()}
        if self._exchange is not None:
            return parcels, self._exchange(own[self._parts.own]), places
        return parcels, lambda: [own[part] for part in range(self._parts.num)], places

    def _is_over(self, sizes: Sequence[int]) -> bool:
        return not all(sizes) if self._drop_last else not any(sizes)

    def _rows(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows of each data rank, and how many of them are real."""
        if list(sizes) == self._full_sizes:
            return self._full, self._full
        if self._together:
            total = sum(sizes)
            return (
                split_rows(total, self._world, even=self._even),
                split_real_rows(total, self._world, even=self._even),
            )
        real: list[int] = []
        for size, members in zip(sizes, self._parts.members, strict=True):
            real += split_real_rows(size, members, even=self._even)
        return (max(real),) * len(real) if self._even else tuple(real), tuple(real)

    def _batch(self, parcels: Mapping[int, Parcel | None], rows: tuple[int, ...], step: int) -> Any:
        own = parcels.get(self._parts.own if not self._together else 0)
        if own is not None and own.batch is not None:
            return own.batch
        if not self._together:
            return self._padded(own, rows[self._rank], step)
        samples = [each for part in sorted(parcels) for each in _samples(parcels[part])]
        if self._deal:
            return [self._cut(samples, rank, step) for rank in range(self._world)]
        return self._cut(samples, self._rank, step)

    def _cut(self, samples: list[Any], rank: int, step: int) -> Any:
        positions = share_of(len(samples), rank, self._world, even=self._even).positions
        return self._collate([samples[position] for position in positions], step, rank) if positions else None

    def _padded(self, parcel: Parcel | None, num_rows: int, step: int) -> Any:
        """This rank's rows of its part, made up to `num_rows`."""
        samples, parts = _samples(parcel), self._parts
        positions = share_of(len(samples), parts.index, parts.members[parts.own], even=self._even).positions
        rows = [samples[position] for position in positions]
        missing = num_rows - len(rows) if self._even else 0
        if missing:
            repeated = samples or self._readers[parts.own].first
            if not repeated:
                raise ConfigError(
                    f"Part {parts.own} of the stream gave no sample to repeat while others go on, so data rank "
                    f"{self._rank} has nothing to fill its batches with. Divide the data more evenly, set "
                    f'`even_batches=False`, or use `sharding="index"`.'
                )
            rows += [repeated[row % len(repeated)] for row in range(missing)]
        return self._collate(rows, step, self._rank) if rows else None


def _samples(parcel: Parcel | None) -> list[Any]:
    return [] if parcel is None or parcel.samples is None else parcel.samples
