"""P7: what the wrapper adds to a training step of a tiny model, where the step itself is almost nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import PACKAGE_OF, Side
from benchmarks.worker import median_of

__all__ = ["block", "comparisons", "training_step"]

Prepared = tuple[Any, Any, Callable[[Any], object], "Callable[..., Any] | None"]
"""Model, optimizer, backward, and the context around a micro-batch where there is one."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """A step with and without the context that counts micro-batches."""
    return [
        Comparison(
            key="P7",
            title=title,
            reference="torch",
            by="added",
            goal=goal,
            samplers={name: workers(side, "step", variant) for name, side in sides.items()},
        )
        for variant, title, goal in (
            ("plain", "one step of a tiny MLP", 8e-6),
            ("accumulate", "the same inside `accumulate`", 15e-6),
        )
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """A few hundred steps."""
    return median_of(training_step(side, variant), warm_up=20, times=300)


def training_step(side: str, variant: str) -> Callable[[], None]:
    """One training step the way a script of that side writes it; `variant` is ``plain`` or ``accumulate``."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    features, labels = torch.randn(8, 16), torch.randn(8, 1)
    prepare = {"torch": _torch, "fabric": _fabric}.get(side, _accelerator)
    model, optimizer, backward, accumulate = prepare(import_module(PACKAGE_OF[side]), model, optimizer)
    loss_function = nn.functional.mse_loss

    def plain() -> None:
        optimizer.zero_grad()
        loss = loss_function(model(features), labels)
        backward(loss)
        optimizer.step()

    if variant == "plain" or accumulate is None:
        return plain
    around = accumulate

    def accumulating() -> None:
        with around(model):
            optimizer.zero_grad()
            loss = loss_function(model(features), labels)
            backward(loss)
            optimizer.step()

    return accumulating


def _torch(library: Any, model: Any, optimizer: Any) -> Prepared:
    import torch.distributed as dist

    if dist.is_torchelastic_launched():  # a world of several: see the DDP benchmark
        dist.init_process_group("gloo")
        model = library.nn.parallel.DistributedDataParallel(model)
    return model, optimizer, library.Tensor.backward, None


def _accelerator(library: Any, model: Any, optimizer: Any) -> Prepared:
    accelerator = library.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, accelerator.backward, accelerator.accumulate


def _fabric(library: Any, model: Any, optimizer: Any) -> Prepared:
    import torch.distributed as dist

    several = dist.is_torchelastic_launched()
    fabric = library.Fabric(accelerator="cpu", devices=2 if several else 1, strategy="ddp" if several else "auto")
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    return model, optimizer, fabric.backward, lambda each: fabric.no_backward_sync(each, enabled=False)
