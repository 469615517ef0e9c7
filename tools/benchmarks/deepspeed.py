"""A step of DeepSpeed on two processes, through accel and by ``deepspeed.initialize`` written out by hand.

Both sides run where DeepSpeed is installed: ``hatch run deepspeed:bench``. Elsewhere there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import Side
from benchmarks.worker import median_of

__all__ = ["block", "comparisons"]

STAGES = (1, 2, 3)
WINDOWS = (1, 4)
MAX_NORM = 1.0
WIDTH = 512
"""Of eight layers: 2.1 million parameters, which is little for what is divided."""
_SIDES = ("torch", "accel")

Step = Callable[[], None]
"""A whole window: its micro-batches and the optimizer step."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Each stage with windows of one and of several micro-batches, clipped on both sides."""
    if not _is_installed():
        return []
    return [
        Comparison(
            key="DeepSpeed",
            title=f"one ZeRO-{stage} step on two gloo processes, a window of {num_steps}, clipped",
            reference="torch",
            by="ratio",
            goal=1.02,
            samplers={
                name: workers(side, "deepspeed", f"{stage} {num_steps}", world_size=2)
                for name, side in sides.items()
                if name in _SIDES
            },
        )
        for stage in STAGES
        for num_steps in WINDOWS
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """Some steps, in step with the other rank; `variant` is the stage and the micro-batches of a window."""
    import torch
    from torch import nn

    stage, num_steps = map(int, variant.split())
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(8)]
    model = nn.Sequential(nn.Linear(64, WIDTH), *blocks, nn.Linear(WIDTH, 8))
    rows = torch.randn(64, 64)
    step = _SPREAD[side](model, rows, stage, num_steps)
    return median_of(step, warm_up=2, times=12)


def _by_hand(model: Any, rows: Any, stage: int, num_steps: int) -> Step:
    """As the documentation of DeepSpeed has it: its engine counts micro-batches, and clips in its step."""
    import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import torch

    config = {
        "train_micro_batch_size_per_gpu": len(rows),
        "gradient_accumulation_steps": num_steps,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> None:
        for _ in range(num_steps):
            engine.backward(engine(rows).square().mean())
            engine.step()

    return step


def _through_accel(model: Any, rows: Any, stage: int, num_steps: int) -> Step:
    import torch

    from accel import Accelerator
    from accel_parallel.deepspeed.plugin import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(zero_stage=stage)  # type: ignore[arg-type] # one of its
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, gradient_accumulation_steps=num_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        for _ in range(num_steps):
            with accelerator.accumulate(model):
                accelerator.backward(model(rows).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return step


_SPREAD = {"torch": _by_hand, "accel": _through_accel}


def _is_installed() -> bool:
    """By its distribution: started as a script, the first place that this module's own name is looked for is here."""
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return False
    return True
