"""P10: what a prepared loader costs a batch beside a plain ``DataLoader``, with data that is in memory already."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import PACKAGE_OF, Side

__all__ = ["block", "comparisons"]

NUM_SAMPLES = 8192


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Whole shuffled epochs: in two batch sizes, and of a dataset whose samples might draw random numbers."""
    return [
        Comparison(
            key="P10",
            title=f"one shuffled batch of {size} from a prepared loader, epoch of {NUM_SAMPLES}{of}",
            reference="torch",
            by="ratio",
            goal=1.05,
            samplers={name: workers(side, "loader", f"{size} {kind}") for name, side in sides.items()},
        )
        for size, kind, of in (
            (8, "tensors", ""),
            (64, "tensors", ""),
            (64, "class", ", dataset of the user's own class"),
        )
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """One epoch, divided by its batches: what happens once an epoch or once in many batches counts too."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    size, kind = variant.split()
    rows, labels = torch.randn(NUM_SAMPLES, 16), torch.zeros(NUM_SAMPLES, dtype=torch.long)
    dataset: Any = TensorDataset(rows, labels) if kind == "tensors" else _Pairs(rows, labels)
    loader = _prepare(side, DataLoader(dataset, batch_size=int(size), shuffle=True))

    def epoch() -> float:
        start = time.perf_counter()
        for _ in loader:
            pass
        return (time.perf_counter() - start) / len(loader)

    return epoch


def _prepare(side: str, loader: Any) -> Any:
    if side == "torch":
        return loader
    library = import_module(PACKAGE_OF[side])
    if side == "fabric":
        return library.Fabric(accelerator="cpu").setup_dataloaders(loader)
    return library.Accelerator(cpu=True).prepare(loader)


class _Pairs:
    """What many users write: it gives the same as a ``TensorDataset``, but nobody can know that it draws nothing."""

    def __init__(self, rows: Any, labels: Any) -> None:
        self._rows = rows
        self._labels = labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._rows[index], self._labels[index]
