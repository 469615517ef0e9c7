"""What is known of a run when a model is prepared: what ``"auto"`` is filled from and numbers are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from accel_parallel.deepspeed.placeholders import DummyScheduler

__all__ = ["Facts", "class_names_of", "hidden_size_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the engine will meet."""

    world_size: int = 1
    """Ranks that see different data."""
    micro_batch_size: int | None = None
    """Rows that a rank takes from the prepared loader at a time; ``None`` where nobody knows."""
    loader_name: str = "the prepared loader"
    """Who says so."""
    num_steps: int = 1
    """Micro-batches of a window."""
    num_steps_source: str = "`Accelerator(gradient_accumulation_steps=...)`"
    """Who says so."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """What the forward computes in."""
    precision_source: str = "`Accelerator(mixed_precision=...)`"
    """Who says so."""
    hidden_size: int | None = None
    """Width of the model, as `hidden_size_of` finds it."""
    module_classes: frozenset[str] | None = None
    """Names of the model's classes, as `class_names_of` finds them; ``None`` checks no name against them."""
    optimizer: torch.optim.Optimizer | None = None
    """What is prepared with the model: one of torch, a `DummyOptim`, or nothing."""
    scheduler: DummyScheduler | None = None
    """The placeholder that is prepared with it."""
    tp_size: int = 1
    """Ranks that share each matrix."""
    sp_size: int = 1
    """Ranks that share each sequence."""
    device_type: str = "cpu"
    """Where the model computes."""
    has_compiler: bool = True
    """Whether DeepSpeed's operators for the host can be built, as `available.has_compiler` finds."""
    has_async_io: bool = True
    """Whether its file access can be built, as `available.has_async_io` finds. Asked for NVMe only."""


def hidden_size_of(model: nn.Module) -> int | None:
    """The width that a model's ``config`` tells, as those of transformers do; the largest where there are several."""
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        size = getattr(holder, "hidden_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
        sizes = getattr(holder, "hidden_sizes", None)
        if isinstance(sizes, (list, tuple)) and sizes:
            return max(int(size) for size in sizes)
    return None


def class_names_of(model: nn.Module) -> frozenset[str]:
    """The names of its modules' classes, alone and with their Python module, by which DeepSpeed takes either."""
    classes = {type(module) for module in model.modules()}
    return frozenset(name for each in classes for name in (each.__name__, f"{each.__module__}.{each.__qualname__}"))
