"""P8: a step of a tiny model on two processes, whose gradients are averaged over gloo."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import Side
from benchmarks.step import training_step
from benchmarks.worker import median_of

__all__ = ["block", "comparisons"]


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Against ``DistributedDataParallel`` written out by hand."""
    return [
        Comparison(
            key="P8",
            title="one DDP step on two gloo processes",
            reference="torch",
            by="ratio",
            goal=1.02,
            samplers={name: workers(side, "ddp", "plain", world_size=2) for name, side in sides.items()},
        )
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """A few hundred steps, in step with the other rank."""
    return median_of(training_step(side, variant), warm_up=20, times=200)
