"""P9: gathering the outputs of a batch for metrics, on two processes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import PACKAGE_OF, Side
from benchmarks.worker import median_of

__all__ = ["block", "comparisons"]

NUM_RANKS = 2
ROWS = 16
"""Of one rank's batch."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Against the one collective that must happen. Fabric has no such call."""
    return [
        Comparison(
            key="P9",
            title="`gather_for_metrics` of (16, 32) float32, two gloo processes",
            reference="torch",
            by="ratio",
            goal=1.2,
            samplers={
                name: workers(side, "gather", "", world_size=NUM_RANKS)
                for name, side in sides.items()
                if name != "fabric"
            },
        )
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """A few hundred calls inside a loop over a loader, in step with the other rank."""
    import torch

    outputs = torch.randn(ROWS, 32)
    gather = _torch() if side == "torch" else _loop(side)
    return median_of(lambda: gather(outputs), warm_up=20, times=200)


def _torch() -> Callable[[Any], object]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather(tensor: Any) -> object:
        gathered = torch.empty(NUM_RANKS * ROWS, 32)
        all_gather(gathered, tensor)
        return gathered

    return gather


def _loop(side: str) -> Callable[[Any], object]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = import_module(PACKAGE_OF[side]).Accelerator(cpu=True)
    dataset = TensorDataset(torch.randn(4 * NUM_RANKS * ROWS, 32))
    loader = accelerator.prepare(DataLoader(dataset, batch_size=ROWS))
    batches = iter(loader)
    next(batches)

    def gather(tensor: Any, _keep: Any = batches) -> object:  # the loop is at its first batch for as long as this lives
        return accelerator.gather_for_metrics(tensor)

    return gather
