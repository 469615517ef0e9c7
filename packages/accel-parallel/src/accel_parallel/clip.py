"""Clipping whose norm is the one that a single process would see."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from accel_parallel.sharded import local_of
from accel_state.errors import ConfigError

__all__ = ["check_clip", "clip_to_norm_", "gradients_of", "scale_gradients_"]

_EPSILON = 1e-6
"""Added to the norm before dividing by it, as `torch.nn.utils.clip_grad_norm_` does."""


def gradients_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients that are there."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def check_clip(max_norm: float, norm_type: float) -> None:
    """Refuse a threshold that would turn gradients around or a norm that is none.

    Raises:
        ConfigError: if `max_norm` is negative or not a number, or `norm_type` is not positive.
    """
    if not max_norm >= 0:
        raise ConfigError(
            f"`max_norm={max_norm}` is no bound for a norm, which is never negative. Give a number of zero or more."
        )
    if not norm_type > 0:
        raise ConfigError(f"`norm_type={norm_type}` does not define a norm. Give a positive number, or `inf`.")


def clip_to_norm_(gradients: Iterable[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale `gradients`, whose common norm is `norm`, so that it is at most `max_norm`."""
    scale_gradients_(gradients, (max_norm / (norm + _EPSILON)).clamp(max=1.0))


def scale_gradients_(gradients: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply gradients in place, divided ones part by part; a tensor as `factor` is a scalar."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    with torch.no_grad():
        for gradient in gradients:
            local = local_of(gradient)
            kinds.setdefault((local.device, local.dtype), []).append(local)
        for (device, dtype), members in kinds.items():
            by = factor.to(device=device, dtype=dtype) if isinstance(factor, torch.Tensor) else factor
            torch._foreach_mul_(members, by)
