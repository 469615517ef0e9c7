"""Seeds of a loader, and random numbers that are drawn aside: the caller's generators are left as they were.

=============================  =======================================  ====================================
what is drawn                  from which generator                     seeded by
=============================  =======================================  ====================================
seed of the order              the loader's own, else torch's default   the script, such as with `set_seed`
order of a shuffled loader     none: a keyed permutation                seed, epoch
order of a user's sampler      python, numpy, torch, its ``generator``  seed, epoch
reading of an iterable         python, numpy, torch                     seed, epoch, worker
a worker's augmentations       python, numpy, torch of the worker       seed, epoch, data rank, worker
augmentations without workers  python, numpy, torch of the process      the script
=============================  =======================================  ====================================
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from accel_data.order import derive_seed

__all__ = ["AsideGenerators", "draw_seed", "reading_seed", "seeded", "worker_seed"]

_ORDER, _WORKERS, _READING = 1, 2, 3  # so that seeds drawn for different ends differ


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed in ``0 .. 2**63 - 1`` from `generator`, by default torch's own."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def worker_seed(seed: int, epoch: int, data_rank: int | None) -> int:
    """Base seed of worker processes in an epoch. ``None``: the same on all ranks, which read one stream."""
    return derive_seed(_WORKERS, seed, epoch, 0 if data_rank is None else data_rank + 1)


def reading_seed(seed: int, epoch: int, worker: int) -> int:
    """Seed under which an iterable dataset is read in an epoch, by one worker of a loader."""
    return derive_seed(_READING, seed, epoch, worker)


class AsideGenerators:
    """States of python's, numpy's and torch's default generators that are swapped in while it is entered.

    What is drawn inside continues where the last time inside ended, and nothing outside notices. Generators
    of accelerators are not touched: data is read on the host.
    """

    def __init__(self, seed: int) -> None:
        self._outside: list[Any] = []
        outside = _states()
        _seed(seed)
        self._inside = _states()
        _restore(outside)

    def __enter__(self) -> None:
        self._outside.append(_states())
        _restore(self._inside)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside = _states()
        _restore(self._outside.pop())


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


def _numpy_random() -> Any:
    """``numpy.random`` where the script has loaded numpy, which this package does not need."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else getattr(numpy, "random", None)


def _states() -> tuple[Any, Any, torch.Tensor]:
    numpy_random = _numpy_random()
    return (
        random.getstate(),
        None if numpy_random is None else numpy_random.get_state(),
        torch.default_generator.get_state(),
    )


def _restore(states: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(states[0])
    numpy_random = _numpy_random()
    if numpy_random is not None and states[1] is not None:
        numpy_random.set_state(states[1])
    torch.default_generator.set_state(states[2])


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy_random = _numpy_random()
    if numpy_random is not None:
        numpy_random.seed(seed % (1 << 32))
    torch.default_generator.manual_seed(seed)
