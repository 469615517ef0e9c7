"""Reading one part of an iterable dataset in batches, from any place of it.

Batches are made here, not by the DataLoader, so that each comes with its number of samples and with the place after
it. Where the dataset, or the iterator that it gives, has ``state_dict`` and ``load_state_dict``, its state is part of
that place, and an epoch goes on from there; else it is read again up to the place, without collation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from accel_data.hugging_face import forget_place, is_streaming
from accel_data.position import PartPlace, WorkerPlace
from accel_data.randomness import AsideGenerators, read_seeded, reading_seed
from accel_data.reading import SampleError

__all__ = ["Parcel", "PartStream", "hand_over"]

_SKIP_CHUNK = 1024  # samples read at a time while skipping


class Parcel(NamedTuple):
    """What a worker hands to the process that trains."""

    size: int
    """Samples of the batch over all ranks that read this part; 0 at the end, -1 for a turn that is passed on."""
    batch: Any
    """This rank's rows of a full batch, collated."""
    samples: list[Any] | None
    """All samples of a batch that is not full or that others divide; at the end, first ones to repeat."""
    worker: int
    place: WorkerPlace
    """Where that worker stands after it."""


class PartStream(IterableDataset[Parcel]):
    """Cuts one part of a stream into batches and collates this rank's rows of each.

    With several workers each reads its own share of the part, as the dataset divides it, and cuts that into batches;
    the last one of each worker may be partial.

    Args:
        dataset: any iterable. The same samples must come on all ranks that read this part; it is read under
            generators seeded alike, and told the epoch by ``set_epoch`` where it has that.
        collate: makes of a full batch's samples what this rank gets of it, told the seed of the worker's epoch and the
            number of the first one in it; ``None`` leaves them as they are.
        size: samples of a full batch, over all ranks that read this part.
        part: its number.
        drop_last: whether a partial batch is left out.
        num_first: how many of the first samples the end comes with.
        stateful: whether the dataset's own state is used.
        rank: this data rank, for errors.
        name: how the loader is called in errors.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        collate: Callable[[list[Any], int, int], Any] | None,
        size: int,
        part: int = 0,
        drop_last: bool = False,
        num_first: int = 0,
        stateful: bool = True,
        rank: int = 0,
        name: str = "data loader",
    ) -> None:
        self.dataset = dataset
        self.size = size
        self.part = part
        self._collate = collate
        self._drop_last = drop_last
        self._num_first = num_first
        self._stateful = stateful
        self._rank = rank
        self._name = name
        self._place: PartPlace | None = None
        self._ahead = 0
        with torch.inference_mode(False):  # it is written to in every epoch, whatever the mode is by then
            self._start = torch.zeros(3, dtype=torch.int64, device="cpu")

    def share_memory(self) -> None:
        """Let workers that live on see which epoch is next. Called before any is started."""
        self._start.share_memory_()  # type: ignore[no-untyped-call]

    def start_at(self, seed: int, epoch: int, place: PartPlace | None, *, ahead: int = 0) -> None:
        """Where the next iteration starts. Workers that run already see the seed and the epoch only.

        Args:
            seed: of the order.
            epoch: which one.
            place: where to go on; ``None`` at the beginning of an epoch.
            ahead: batches of all workers together, from there on, that will not be used and need no collation.
        """
        self._place, self._ahead = place, ahead
        self._start.copy_(torch.tensor([seed, epoch, place is not None or ahead > 0], device="cpu"))
        _tell_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Parcel]:
        seed, epoch, moved = self._start.tolist()
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        place, turn, ahead = WorkerPlace(), 0, 0
        if moved:
            if self._place is not None:
                place, turn = self._place.workers[worker], self._place.turn
            # If a worker before this one ends among them, this one makes fewer than will be left out, never more.
            ahead = max(0, -(-(self._ahead - (worker - turn) % num_workers) // num_workers))
        _tell_epoch(self.dataset, epoch)
        if place.ended:
            if self._num_first and worker == 0:
                yield Parcel(0, None, self._beginning(seed, epoch), worker, place)
            return
        if worker < turn:
            yield Parcel(-1, None, None, worker, place)
        reader = _Reader(self, reading_seed(seed, epoch, self.part, worker), worker, place)
        for _ in range(ahead):
            size = len(reader.read(self.size))
            if size == self.size or (size and not self._drop_last):
                yield Parcel(size, None, None, worker, reader.place)
        first: list[Any] | None = [] if place.samples == 0 and not ahead else None
        yield from self._parcels(reader, worker, first)
        if self._num_first and worker == 0 and first is None:
            first = self._beginning(seed, epoch)
        yield Parcel(0, None, first or None, worker, reader.place._replace(ended=True))

    def _parcels(self, reader: _Reader, worker: int, first: list[Any] | None) -> Iterator[Parcel]:
        """The rest, noting in `first` the samples that the end comes with."""
        while samples := reader.read(self.size):
            if first is not None and len(first) < self._num_first:
                first += samples[: self._num_first - len(first)]
            if len(samples) < self.size:
                if not self._drop_last:
                    yield Parcel(len(samples), None, samples, worker, reader.place)
            elif self._collate is None:
                yield Parcel(self.size, None, samples, worker, reader.place)
            else:
                yield Parcel(
                    self.size,
                    self._collate(samples, reader.seed, reader.place.samples - self.size),
                    None,
                    worker,
                    reader.place,
                )

    def _beginning(self, seed: int, epoch: int) -> list[Any]:
        """The first samples of the epoch, read anew."""
        return _Reader(self, reading_seed(seed, epoch, self.part, 0), 0, WorkerPlace()).read(self._num_first)


class _Reader:
    """One worker's samples of one epoch, in order, and where they are."""

    def __init__(self, stream: PartStream, seed: int, worker: int, place: WorkerPlace) -> None:
        self.place = place
        self.seed = seed
        self._stream = stream
        self._worker = worker
        self._generators = AsideGenerators(seed)
        stateful = stream._stateful
        with self._generators:
            forget_place(stream.dataset)
            samples, self._owner = _opened(stream.dataset, place.state, stateful=stateful)
        if self._owner is not None:
            # Its state says which samples come, not what they draw: that has to depend on their numbers alone.
            samples = read_seeded(samples, self._generators, seed=seed, first=place.at)
        # No generator of this object's own lies over them: the two would hold each other, so an iteration that is left
        # would last until the collector finds it, in whatever thread. Pipelines that read in threads of their own wait
        # for those when they end, which then may be that very thread.
        self._samples = samples
        self._number = place.at
        self._skip(place.samples - place.at)

    def read(self, count: int) -> list[Any]:
        """The next samples, fewer than `count` at the end."""
        samples = self._take(count)
        if samples:
            ended = len(samples) < count
            self.place = self.place._replace(samples=self._number, ended=ended)
            if ended:
                self.place = self.place._replace(state=None, at=self._number)
            elif self._owner is not None:
                state = self._owner.state_dict()
                if not is_streaming(self._owner):
                    state = copy.deepcopy(state)  # the dataset may go on changing what it gave
                self.place = self.place._replace(state=state, at=self._number)
        return samples

    def _skip(self, count: int) -> None:
        while count > 0 and self._take(min(count, _SKIP_CHUNK)):
            count -= _SKIP_CHUNK

    def _take(self, count: int) -> list[Any]:
        taken: list[Any] = []
        try:
            with self._generators:
                taken.extend(islice(self._samples, count))
        except Exception as error:
            raise self._failed(self._number + len(taken), error) from error
        self._number += len(taken)
        return taken

    def _failed(self, number: int, error: Exception) -> SampleError:
        stream = self._stream
        worker = "" if get_worker_info() is None else f", worker {self._worker}"
        return SampleError(
            f"Sample {number} of part {stream.part}{worker} of the {stream._name} was read on data rank "
            f"{stream._rank}, and the dataset raised {type(error).__name__}: {error}. "
            f"Mend the dataset, or let it leave out what it cannot read; the training can then be resumed."
        )


def hand_over(parcel: Parcel) -> Parcel:
    """Collation of the underlying DataLoader: batches are made already."""
    return parcel


def _opened(dataset: Any, state: Any, *, stateful: bool) -> tuple[Iterator[Any], Any]:
    """An iterator from a state on, and whose state that is: its own, the dataset's, or nobody's."""
    samples = iter(dataset)
    if not stateful:
        return samples, None
    if _has_state(samples):
        if state is not None:
            samples.load_state_dict(state)
        return samples, samples
    if not _has_state(dataset):
        return samples, None
    if state is not None:
        dataset.load_state_dict(state)
        samples = iter(dataset)
    return samples, dataset


def _has_state(each: Any) -> Any:
    return callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))


def _tell_epoch(dataset: Any, epoch: int) -> None:
    set_epoch = getattr(dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
