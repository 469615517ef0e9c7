"""What is refused of the objects that are prepared with DeepSpeed, and of what is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.strategy import Bundle
from accel_state.errors import ConfigError

__all__ = ["refuse_bundle", "refuse_clip", "refuse_unread_schedule"]


def refuse_bundle(bundle: Bundle, *, prepared: Sequence[nn.Module]) -> nn.Module | None:
    """The model of the bundle that its optimizer trains; ``None`` where there is no optimizer.

    Args:
        bundle: about to be prepared.
        prepared: models that are trained already.

    Raises:
        ConfigError: for a second model to train, an optimizer without its model, or a schedule without effect.
    """
    if not bundle.optimizers:
        return None
    if len(bundle.optimizers) + len(prepared) > 1:
        raise ConfigError(
            f"{len(bundle.optimizers) + len(prepared)} optimizers were given to one Accelerator with DeepSpeed, whose "
            f"engine has one, and one backward. Make an `Accelerator` for each model that is trained, and call the "
            f"`backward` of its own."
        )
    (optimizer,) = bundle.optimizers
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owners = [model for model in bundle.models if _holds_any(model, held)]
    if len(owners) != 1:
        what = "belongs to no model of the same call" if not owners else f"trains {len(owners)} models at once"
        raise ConfigError(
            f"The {type(optimizer).__name__} {what}, and DeepSpeed divides one model together with its optimizer. "
            f"Prepare both in one call: `model, optimizer = accelerator.prepare(model, optimizer)`; several models "
            f"under one optimizer go into one `nn.Module`."
        )
    _refuse_odd_parameters(owners[0])
    _refuse_frozen_groups(optimizer)
    for scheduler in bundle.schedulers:
        refuse_unread_schedule(scheduler)
    return owners[0]


def refuse_unread_schedule(scheduler: Any) -> None:
    """Refuse a schedule that sets the learning rate of a placeholder, which nothing reads.

    Raises:
        ConfigError: naming it, and what does the same.
    """
    if isinstance(scheduler, DummyScheduler) or not isinstance(getattr(scheduler, "optimizer", None), DummyOptim):
        return
    name = type(scheduler).__name__
    raise ConfigError(
        f"The {name} was made for a `DummyOptim`, in whose place DeepSpeed makes another optimizer, so the learning "
        f"rate would never change. Give `DummyScheduler(optimizer, lr_scheduler_callable=lambda optimizer: "
        f"{name}(optimizer, ...))`, which makes it for that one, and have no `scheduler` section in the configuration."
    )


def refuse_clip(prepared: Any, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> bool:
    """Whether DeepSpeed clips to this same norm by itself.

    Raises:
        ConfigError: for another norm than the one it can measure, or that its configuration says.
    """
    if norm_type != 2.0:
        raise ConfigError(
            f"`clip_grad_norm_(norm_type={norm_type})` was called, and DeepSpeed measures the 2-norm of gradients, "
            f"wherever their parts lie. Leave `norm_type` out."
        )
    trained = {id(parameter) for group in prepared.states.groups for parameter in group}
    given = {id(parameter) for parameter in _listed(parameters)}
    if trained - given:
        raise ConfigError(
            f"`clip_grad_norm_` was given {len(trained & given)} of {len(trained)} trained parameters, and DeepSpeed "
            f"clips all of them to one norm. Give `model.parameters()`."
        )
    configured = float(prepared.config.values.get("gradient_clipping", 0.0))
    if configured and configured != max_norm:
        source = next((row[2] for row in prepared.config.rows if row[0] == "gradient_clipping"), "the configuration")
        raise ConfigError(
            f"`clip_grad_norm_(max_norm={max_norm})` was called, and `gradient_clipping` is {configured} ({source}), "
            f"to which DeepSpeed clips in its step. Use one value, or take one of them out."
        )
    return bool(configured)


def _listed(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _holds_any(model: nn.Module, parameters: Iterable[torch.Tensor]) -> bool:
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for parameter in parameters)


def _refuse_frozen_groups(optimizer: Optimizer) -> None:
    for number, group in enumerate(optimizer.param_groups):
        if group["params"] and not any(parameter.requires_grad for parameter in group["params"]):
            raise ConfigError(
                f"Group number {number} of the {type(optimizer).__name__} holds {len(group['params'])} parameters, and "
                f"none of them is trained, so that DeepSpeed has nothing to divide in it. Make the optimizer from the "
                f"parameters with `requires_grad`."
            )


def _refuse_odd_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if not shape or 0 in shape or not parameter.is_floating_point():
            raise ConfigError(
                f"`{name}` has shape {shape} and is {parameter.dtype}, and DeepSpeed takes parameters of at least one "
                f"dim and one element, in floating point. Give a scalar the shape (1,), and make others a buffer."
            )
        if parameter.requires_grad and parameter.dtype is torch.float64:
            raise ConfigError(
                f"`{name}` is float64, and DeepSpeed trains in float32 or, with float32 beside them, 16 bits. "
                f"Call `model.float()` before it gets its optimizer."
            )
