"""In which dtypes a sharded model is gathered, computed and reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
from accel_state.errors import ConfigError

__all__ = ["precision_policy", "refuse_other_precision"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_policy(options: FullyShardedDataParallelPlugin) -> Any:
    """torch's policy for what the options say: one word, parts, or such a policy itself."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    given = options.mixed_precision_policy
    if given is None or given == "no":
        return MixedPrecisionPolicy()
    if isinstance(given, str):
        computed = _DTYPES[given]
        return MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)
    if isinstance(given, Mapping):
        return MixedPrecisionPolicy(**{name: _dtype(name, value) for name, value in given.items()})
    return given


def _dtype(name: str, value: torch.dtype | str | bool | None) -> Any:
    known = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")
    if name not in known:
        raise ConfigError(f"`mixed_precision_policy` has no part `{name}`. Its parts are {', '.join(known)}.")
    if not isinstance(value, str):
        return value
    found = _DTYPES.get(value) or getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(
            f"`mixed_precision_policy` has `{name}={value!r}`, which is no dtype. Use bf16, fp16 or fp32, or a dtype."
        )
    return found


def refuse_other_precision(options: FullyShardedDataParallelPlugin, precision: str) -> None:
    """Gathering in a narrow type that the run does not compute in: float16 without loss scaling, or twice rounded."""
    computed = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(precision_policy(options).param_dtype)
    if computed == "fp16" != precision or (computed == "bf16" and precision == "fp16"):
        raise ConfigError(
            f"`mixed_precision_policy={options.mixed_precision_policy!r}` computes in {computed}, and the run's "
            f"`mixed_precision={precision!r}` decides on loss scaling and autocast. Set `mixed_precision={computed!r}` "
            f"and leave the policy out, or give it the same type."
        )
