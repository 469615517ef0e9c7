"""Seeds of a loader, and random numbers that are drawn aside: the caller's generators are left as they were.

=============================  =======================================  ====================================
what is drawn                  from which generator                     seeded by
=============================  =======================================  ====================================
seed of the order              the loader's own, else torch's default   the script, such as with `set_seed`
order of a shuffled loader     none: a keyed permutation                seed, epoch
order of a user's sampler      python, numpy, torch, its ``generator``  seed, epoch
augmentations of a sample of   python, numpy, torch                     seed, epoch, position of the sample
a map-style dataset, with or                                            in the epoch
without workers
reading of an iterable         python, numpy, torch                     seed, epoch, part, worker; with a
                                                                        state of its own also the sample
a batch in ``collate_fn``      python, numpy, torch                     seed, epoch, its first position; of a
                                                                        stream's partial step, its number and rank
the rest of a worker           python, numpy, torch of the worker       seed, epoch in which it was started,
                                                                        data rank (of a stream, part), worker
=============================  =======================================  ====================================

"python, numpy, torch" are the default generators of the host: the functions of `random` and of ``numpy.random``, and
torch's on the CPU. Generators of accelerators are not touched, since data is read on the host, and neither are those
that a dataset makes itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import TracebackType
from typing import Any

import torch

from accel_data.order import derive_seed

__all__ = [
    "AsideGenerators",
    "augmentation_seed",
    "collating_seed",
    "draw_seed",
    "read_seeded",
    "reading_seed",
    "sample_seed",
    "seeded",
    "worker_seed",
]

_ORDER, _WORKERS, _READING, _AUGMENTING, _COLLATING = 1, 2, 3, 4, 5  # so that seeds drawn for different ends differ


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed in ``0 .. 2**63 - 1`` from `generator`, by default torch's own."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def worker_seed(seed: int, epoch: int, place: int) -> int:
    """Base seed of the worker processes that are started in an epoch.

    Args:
        seed: of the loader.
        epoch: which one.
        place: the data rank; of a stream, the part that they read.
    """
    return derive_seed(_WORKERS, seed, epoch, place)


def reading_seed(seed: int, epoch: int, part: int, worker: int) -> int:
    """Seed under which a part of an iterable dataset is read in an epoch, by one worker of a loader."""
    return derive_seed(_READING, seed, epoch, part, worker)


def augmentation_seed(seed: int, epoch: int) -> int:
    """Seed of the augmentations of an epoch, in ``0 .. 2**63 - 1``. Those of a sample come from `sample_seed`."""
    return derive_seed(_AUGMENTING, seed, epoch) >> 1


def sample_seed(seed: int, position: int) -> int:
    """Seed under which one sample is read, in ``0 .. 2**64 - 1``; 0.8 µs.

    Args:
        seed: from `augmentation_seed`, or from `reading_seed` for a stream.
        position: of the sample, in the epoch or in the part of the stream that one worker reads; from 0. Two
            positions under one seed never get the same seed.
    """
    return derive_seed(seed ^ position)


def collating_seed(seed: int, first: int) -> int:
    """Seed under which a batch is collated, in ``0 .. 2**64 - 1``.

    Args:
        seed: as for `sample_seed`.
        first: position of the batch's first row.
    """
    return derive_seed(_COLLATING, seed, first)


class AsideGenerators:
    """The default generators of this process, seeded apart: swapped in while it is entered.

    What is drawn inside continues where the last time inside ended, and nothing outside notices. Entering it again
    while it is entered changes nothing.
    """

    def __init__(self, seed: int) -> None:
        from accel_data.generators import default_generators  # with numpy.random, when data is read

        self._generators = default_generators()
        self._depth = 0
        self._outside = self._look()
        try:
            self.seed(seed)
            self._inside = self._look()
        finally:
            self._put_back(self._outside)

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._outside = self._look()
            self._put_back(self._inside)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._inside = self._look()
            self._put_back(self._outside)

    def seed(self, seed: int) -> None:
        """Seed what is inside anew. Called while it is entered."""
        for generator in self._generators:
            generator.seed(seed)

    def _look(self) -> list[Any]:
        return [generator.look() for generator in self._generators]

    def _put_back(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.put_back(state)


def read_seeded(samples: Iterator[Any], generators: AsideGenerators, *, seed: int, first: int) -> Iterator[Any]:
    """The samples of a stream, each read under a seed of its own: 8 µs a sample more.

    What a sample draws then depends on its number only, not on where reading began. Nothing is read ahead. The
    result is iterated while `generators` is entered, so that nothing outside notices.

    Args:
        samples: the stream.
        generators: entered once for as many samples as are read at a time.
        seed: from `reading_seed`.
        first: number of the first of these samples in the stream, from 0.
    """
    for number in count(first):
        generators.seed(sample_seed(seed, number))
        try:
            sample = next(samples)
        except StopIteration:
            return
        yield sample


@contextmanager
def seeded(*parts: int, generators: tuple[torch.Generator, ...] = ()) -> Iterator[None]:
    """Draw the order of a user's sampler: default generators and `generators` seeded, and restored afterwards."""
    seed = derive_seed(_ORDER, *parts)
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        with AsideGenerators(seed):
            yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
