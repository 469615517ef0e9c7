"""Dtypes by name, by size, and which of them a model uses for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from accel_state.config import MixedPrecision, did_you_mean
from accel_state.errors import ConfigError

__all__ = ["DTYPE_OF_PRECISION", "DTypePolicy", "dtype_size_bytes", "parse_dtype"]

DTYPE_OF_PRECISION: Mapping[MixedPrecision, torch.dtype | None] = MappingProxyType(
    {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
)
"""Dtype in which a setting of ``mixed_precision`` computes; ``None``: that of the parameters."""

_SHORT = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DTypePolicy:
    """Which dtype a model uses for what. ``None`` leaves a dtype as it is found."""

    param_dtype: torch.dtype | None = None
    """In which parameters are stored."""
    compute_dtype: torch.dtype | None = None
    """In which the forward and backward passes compute."""
    output_dtype: torch.dtype | None = None
    """To which floating-point outputs of the forward pass are converted."""
    reduce_dtype: torch.dtype | None = None
    """In which gradients travel between processes."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ConfigError(
                    f"`{name}={dtype!r}` is no floating-point dtype, and models compute in those. "
                    f"Give one such as `torch.bfloat16` (`parse_dtype` reads names), or `None`."
                )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a name: torch's own (``"bfloat16"``, ``"torch.int8"``) or a short one (``"bf16"``, ``"fp32"``).

    Raises:
        ConfigError: if there is none.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = str(dtype).strip().lower().removeprefix("torch.")
    found = _SHORT.get(name) or getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        known = [*_SHORT, *sorted(each for each in dir(torch) if isinstance(getattr(torch, each), torch.dtype))]
        raise ConfigError(
            f"{dtype!r} is no dtype of torch {torch.__version__}.{did_you_mean(name, known)} "
            f"Give a `torch.dtype` or a name such as `bf16`, `float32` or `int8`."
        )
    return found


def dtype_size_bytes(dtype: torch.dtype) -> float:
    """Bytes of one element, a fraction below 8 bits.

    torch itself says 1 byte for ``torch.int4`` and its like, as it does not pack them; checkpoints and quantizers
    do. An element of a type that is packed by its definition, such as ``float4_e2m1fn_x2``, is the whole pack.
    """
    name = str(dtype).removeprefix("torch.")
    for prefix in ("uint", "int"):
        bits = name.removeprefix(prefix)
        if name.startswith(prefix) and bits.isdigit() and int(bits) < 8:
            return int(bits) / 8
    # Quantized types count logical elements: ``quint4x2`` holds two a byte.
    if name.startswith("quint") and "x" in name:
        return 1 / int(name.rpartition("x")[2])
    return float(dtype.itemsize)
