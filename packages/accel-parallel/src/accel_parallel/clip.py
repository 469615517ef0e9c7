"""Clipping whose norm is the one that a single process would see."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from accel_state.errors import ConfigError

__all__ = ["check_clip", "gradients_of"]


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
