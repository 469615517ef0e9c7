"""P11: from a place far into an epoch to the first batch there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import PACKAGE_OF, Side

__all__ = ["block", "comparisons"]

BATCH_SIZE = 8


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """What the place costs over the beginning of the same loader. Fabric has no such call."""
    rows = (
        ("skip", "first batch after skipping {skipped:,} of {samples:,} shuffled samples", 1_000_000, 800_000, True),
        (
            "skip",
            "first batch after skipping {skipped:,} of {samples:,} shuffled samples",
            200_000_000,
            100_000_000,
            False,
        ),
        (
            "state",
            "first batch after loading a state at {skipped:,} of {samples:,} shuffled samples",
            200_000_000,
            100_000_000,
            False,
        ),
        (
            "iterable",
            "first batch after {skipped:,} of {samples:,} samples of an iterable that knows its place",
            1_000_000,
            800_000,
            True,
        ),
    )
    return [
        Comparison(
            key="P11",
            title=title.format(skipped=skipped, samples=samples),
            reference="beginning",
            by="added",
            goal=5e-3,
            samplers={
                "beginning": workers(sides["accel"], "resume", f"{how} {samples} 0"),
                "accel": workers(sides["accel"], "resume", f"{how} {samples} {skipped}"),
                **(
                    {"accelerate": workers(sides["accelerate"], "resume", f"{how} {samples} {skipped}")}
                    if with_peer and "accelerate" in sides
                    else {}
                ),
            },
        )
        # The peer is left out where it would need gigabytes for a list of all indices.
        for how, title, samples, skipped, with_peer in rows
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """Go there, and wait for one batch."""
    from torch.utils.data import DataLoader

    library = import_module(PACKAGE_OF[side])
    how, samples, skipped = variant.split()
    num_batches = int(skipped) // BATCH_SIZE
    dataset: Any = _counting(int(samples)) if how == "iterable" else _Numbers(int(samples))
    shuffle = None if how == "iterable" else True
    loader = library.Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=shuffle))
    state = (
        _state_after(loader, num_batches, skip=library.skip_first_batches)
        if side == "accel" and how != "skip"
        else None
    )

    def resume() -> float:
        start = time.perf_counter()
        if state is None:
            batches = iter(library.skip_first_batches(loader, num_batches))
        else:
            loader.load_state_dict(state)
            batches = iter(loader)
        next(batches)
        return time.perf_counter() - start

    return resume


def _state_after(loader: Any, num_batches: int, *, skip: Any) -> dict[str, Any]:
    """What a checkpoint in the body of that batch holds."""
    state: dict[str, Any] = loader.state_dict()
    if num_batches:
        for _ in skip(loader, num_batches - 1):
            state = loader.state_dict()
            break
    return state


class _Numbers:
    """A dataset that holds nothing."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index


def _counting(length: int) -> Any:
    """An iterable that holds nothing, and knows its place. The class needs torch, which this file imports late."""
    from torch.utils.data import IterableDataset

    class Counting(IterableDataset[int]):
        def __init__(self) -> None:
            self.start = self.place = 0

        def __iter__(self) -> Iterator[int]:
            start, self.start = self.start, 0
            for self.place in range(start + 1, length + 1):
                yield self.place - 1

        def state_dict(self) -> dict[str, int]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.start = state["place"]

    return Counting()
