"""P11: from a place far into an epoch to the first batch there."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import PACKAGE_OF, Side

__all__ = ["block", "comparisons"]

BATCH_SIZE = 8


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """What the place costs over the beginning of the same loader. Fabric has no such call."""
    ours = sides["accel"]
    skipping = {name: side for name, side in sides.items() if name in ("accel", "accelerate")}
    return [
        Comparison(
            key="P11",
            title=f"first batch after skipping {skipped:,} of {samples:,} shuffled samples",
            reference="beginning",
            by="added",
            goal=5e-3,
            samplers={
                "beginning": workers(ours, "resume", f"{samples} 0"),
                **{
                    name: workers(skipping[name], "resume", f"{samples} {skipped}")
                    for name in names
                    if name in skipping
                },
            },
        )
        for samples, skipped, names in (
            (1_000_000, 800_000, ("accel", "accelerate")),
            (200_000_000, 100_000_000, ("accel",)),  # a list of all indices would need gigabytes
        )
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """Skip, and wait for one batch."""
    from torch.utils.data import DataLoader

    library = import_module(PACKAGE_OF[side])
    samples, skipped = map(int, variant.split())
    dataset: Any = _Numbers(samples)
    loader = library.Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True))

    def resume() -> float:
        start = time.perf_counter()
        batches = iter(library.skip_first_batches(loader, skipped // BATCH_SIZE))
        next(batches)
        return time.perf_counter() - start

    return resume


class _Numbers:
    """A dataset that holds nothing."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index
