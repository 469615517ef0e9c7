"""From the name of a precision and a device to what computes in it."""

from __future__ import annotations

import logging

import torch

from accel_precision.autocast import FullPrecision, MixedPrecision
from accel_precision.scaler import DynamicLossScaler, NoScaler
from accel_precision.settings import AutocastKwargs, GradScalerKwargs
from accel_state.config import did_you_mean
from accel_state.device import DeviceKind, device_kind
from accel_state.dtypes import DTYPE_OF_PRECISION, DTypePolicy
from accel_state.errors import ConfigError
from accel_state.protocols import LossScaler, Precision

__all__ = ["precision"]

_DTYPES: dict[str, torch.dtype | None] = {name: dtype for name, dtype in DTYPE_OF_PRECISION.items()}  # noqa: C416
_NAMES = [*_DTYPES]

_logger = logging.getLogger(__name__)


def precision(
    name: str,
    *,
    device: torch.device,
    autocast: AutocastKwargs | None = None,
    scaler: GradScalerKwargs | None = None,
) -> Precision:
    """What computes in the precision `name` on `device`.

    ``"bf16"`` on a device without bfloat16 becomes ``"fp16"`` with loss scaling, and a warning says so; the result's
    ``name`` is what is really computed in.

    Args:
        name: ``"no"``, ``"bf16"`` or ``"fp16"``.
        device: where models compute.
        autocast: how to cast; by default `AutocastKwargs`.
        scaler: how to scale the loss under float16; by default `GradScalerKwargs`.

    Raises:
        ConfigError: if the name is unknown, the device cannot compute in it, or a setting other than the default was
            given that has no effect on it.
    """
    if name not in _NAMES:
        raise ConfigError(
            f"`mixed_precision={name!r}` is not a precision this version computes in.{did_you_mean(name, _NAMES)} "
            f"Use one of {', '.join(_NAMES)}."
        )
    chosen = _supported(name, device)
    if chosen != "fp16" and scaler is not None and scaler != GradScalerKwargs():
        raise ConfigError(
            f"{scaler} was given with `mixed_precision={name!r}`, but only float16 scales the loss, so it would have "
            f"no effect. Leave it out, or use `mixed_precision='fp16'`."
        )
    if chosen == "no":
        if autocast is not None and autocast != AutocastKwargs():
            raise ConfigError(
                f"{autocast} was given with `mixed_precision='no'`, which casts nothing, so it would have no effect. "
                f"Leave it out, or use `mixed_precision='bf16'`."
            )
        return FullPrecision()
    policy = DTypePolicy(compute_dtype=_DTYPES[chosen], output_dtype=torch.float32)
    return MixedPrecision(policy, name=chosen, device=device, scaler=_scaler(chosen, device, scaler), autocast=autocast)


def _scaler(name: str, device: torch.device, settings: GradScalerKwargs | None) -> LossScaler:
    settings = GradScalerKwargs() if settings is None else settings
    if name != "fp16" or not settings.enabled:
        return NoScaler()
    return DynamicLossScaler(
        init_scale=settings.init_scale,
        growth_factor=settings.growth_factor,
        backoff_factor=settings.backoff_factor,
        growth_interval=settings.growth_interval,
        device=device,
    )


def _supported(name: str, device: torch.device) -> str:
    """`name`, or what is computed in instead."""
    kind = device_kind(device.type)
    if name == "bf16" and not _has_bfloat16(kind, device) and "fp16" in kind.precisions:
        _logger.warning(
            "mixed_precision='bf16' was asked for, but the device %s does not compute in bfloat16: computing in "
            "float16 with loss scaling instead. Ask for mixed_precision='fp16' to say so yourself.",
            device,
        )
        return "fp16"
    if name not in kind.precisions:
        raise ConfigError(
            f"`mixed_precision={name!r}` was asked for, but a device of type {kind.type!r} does not compute in it. "
            f"Use one of {', '.join(known for known in _NAMES if known in kind.precisions)}."
        )
    return name


def _has_bfloat16(kind: DeviceKind, device: torch.device) -> bool:
    """Whether `device` computes in bfloat16, natively or by emulation: asked where torch knows, else tried."""
    if "bf16" not in kind.precisions:
        return False
    known = kind.call("is_bf16_supported")
    if known is not None:
        return bool(known)
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True
