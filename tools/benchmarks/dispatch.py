"""Batches that rank 0 reads for two processes, with data that is in memory already."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import PACKAGE_OF, Side

__all__ = ["block", "comparisons"]

NUM_RANKS = 2
ROWS = 8
"""Of one rank's batch."""
FLOATS = 64 * 1024
"""Of one row: the rows of both ranks are 4 MiB."""
NUM_BATCHES = 40


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Against accelerate, which has the same setting; Fabric and torch have none. Without it, the time alone."""
    having = {name: side for name, side in sides.items() if name in ("accel", "accelerate")}
    return [
        Comparison(
            key="Dispatch",
            title="one batch of 4 MiB that rank 0 reads for two gloo processes",
            reference="accelerate" if "accelerate" in having else None,
            by="ratio" if "accelerate" in having else "time",
            goal=0.5 if "accelerate" in having else 4e-3,
            samplers={name: workers(side, "dispatch", "", world_size=NUM_RANKS) for name, side in having.items()},
        )
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """One epoch in step with the other rank, divided by its batches."""
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, TensorDataset

    library = import_module(PACKAGE_OF[side])
    configuration = library.DataLoaderConfiguration(dispatch_batches=True)
    accelerator = library.Accelerator(cpu=True, dataloader_config=configuration)
    num_rows = NUM_BATCHES * NUM_RANKS * ROWS
    dataset = TensorDataset(torch.randn(num_rows, FLOATS), torch.zeros(num_rows, dtype=torch.long))
    loader = accelerator.prepare(DataLoader(dataset, batch_size=ROWS))
    together = torch.zeros(1)

    def epoch() -> float:
        start = time.perf_counter()
        for _ in loader:
            dist.all_reduce(together)  # as the gradients of a step would be: no rank runs ahead
        return (time.perf_counter() - start) / NUM_BATCHES

    return epoch
