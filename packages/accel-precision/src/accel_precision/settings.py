"""What users may set about autocast and loss scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from accel_state.errors import ConfigError

__all__ = ["AutocastKwargs", "GradScalerKwargs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AutocastKwargs:
    """How the forward pass casts."""

    enabled: bool = True
    """Whether operations are cast at all. ``False`` leaves every operation in the dtype of its inputs."""
    cache_enabled: bool = True
    """Whether the cast copy of a parameter is kept until the context is left, at the cost of its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradScalerKwargs:
    """How the loss is scaled under float16. Has no effect in any other precision, and is refused there."""

    init_scale: float = 65536.0
    """First factor on the loss."""
    growth_factor: float = 2.0
    """Multiplies the scale after `growth_interval` updates without a non-finite gradient; greater than 1."""
    backoff_factor: float = 0.5
    """Multiplies the scale after an update with a non-finite gradient; between 0 and 1."""
    growth_interval: int = 2000
    """Updates in a row without a non-finite gradient after which the scale grows."""
    enabled: bool = True
    """``False`` computes in float16 without any scaling; small gradients then become zero."""

    def __post_init__(self) -> None:
        _check(
            _is_positive(self.init_scale), "init_scale", self.init_scale, "a positive finite number, such as 65536.0"
        )
        _check(
            _is_positive(self.growth_factor) and self.growth_factor > 1.0,
            "growth_factor",
            self.growth_factor,
            "a finite number greater than 1, such as 2.0",
        )
        _check(
            _is_positive(self.backoff_factor) and self.backoff_factor < 1.0,
            "backoff_factor",
            self.backoff_factor,
            "a number between 0 and 1, such as 0.5",
        )
        interval = self.growth_interval
        _check(
            isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1,
            "growth_interval",
            interval,
            "a positive integer, such as 2000",
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0.0


def _check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"`{name}={value!r}` would not keep the loss scale positive and adapting. Give {wanted}.")
