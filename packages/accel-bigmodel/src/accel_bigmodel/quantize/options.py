"""What is quantized to what: the options of each backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from accel_state.config import did_you_mean
from accel_state.dtypes import parse_dtype
from accel_state.errors import ConfigError

__all__ = ["BnbQuantizationConfig", "TorchaoQuantizationConfig"]

BnbQuantType = Literal["fp4", "nf4"]
TorchaoWeights = Literal["int8", "int4"]

_COMPUTE = (torch.float32, torch.float16, torch.bfloat16)
_GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class BnbQuantizationConfig:
    """Layers of bitsandbytes: LLM.int8() (arXiv:2208.07339), or the 4-bit types of QLoRA (arXiv:2305.14314)."""

    load_in_8bit: bool = False
    """Whether weights are int8 with a float32 scale a row. Exactly one of this and `load_in_4bit` is given."""
    llm_int8_threshold: float | None = None
    """Columns of an input that hold a larger magnitude are multiplied in the input's dtype; 0 multiplies all in int8.
    8-bit only, 6.0 by default."""
    load_in_4bit: bool = False
    """Whether weights are 4-bit with a scale for every 64 of them."""
    bnb_4bit_quant_type: BnbQuantType | None = None
    """``"nf4"``, whose values are the quantiles of a normal distribution as weights tend to have, or ``"fp4"``, a float
    of 4 bits. 4-bit only, ``"fp4"`` by default."""
    bnb_4bit_use_double_quant: bool | None = None
    """Whether the scales are quantized too: 0.37 bits a weight less. 4-bit only, false by default."""
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    """To which inputs are cast and weights dequantized. 4-bit only; by default `torch_dtype`, or without it the dtype
    in which the weight was stored."""
    torch_dtype: torch.dtype | str | None = None
    """To which all other floating-point tensors are cast, and weights before they are quantized. ``None`` leaves them
    as they are stored."""
    skip_modules: Sequence[str] | None = None
    """Modules whose linear layers are not quantized: full names (``"layers.0"``) or parts of them (``"lm_head"``). By
    default the output layer."""
    keep_in_fp32_modules: Sequence[str] | None = None
    """Modules, and tensors, that stay float32 whatever `torch_dtype` says and are not quantized; as `skip_modules`. By
    default those that the model lists in ``_keep_in_fp32_modules``."""
    enable_offload: bool = False
    """Whether ``"cpu"`` and ``"disk"`` may stand beside an accelerator in a device map. Layers placed there are not
    quantized, as theirs keep state that cannot be streamed, and travel in `torch_dtype`."""

    def __post_init__(self) -> None:
        for name in ("load_in_8bit", "load_in_4bit", "enable_offload"):
            _check_bool(name, getattr(self, name))
        if self.load_in_8bit == self.load_in_4bit:
            given = "both" if self.load_in_8bit else "neither"
            raise ConfigError(
                f"A `BnbQuantizationConfig` was given {given} of `load_in_8bit=True` and `load_in_4bit=True`, and a "
                f"weight has one width. Give exactly one of them."
            )
        _check_mode(self)
        if self.load_in_8bit:
            _set_default(self, "llm_int8_threshold", 6.0)
            threshold = self.llm_int8_threshold
            if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
                raise ConfigError(
                    f"`llm_int8_threshold={threshold!r}` is no magnitude that inputs are compared with. Give a number "
                    f"of at least 0, such as 6.0."
                )
        else:
            _set_default(self, "bnb_4bit_quant_type", "fp4")
            _set_default(self, "bnb_4bit_use_double_quant", False)
            _check_choice("bnb_4bit_quant_type", self.bnb_4bit_quant_type, get_args(BnbQuantType))
            _check_bool("bnb_4bit_use_double_quant", self.bnb_4bit_use_double_quant)
            _resolve_dtype(self, "bnb_4bit_compute_dtype")
        _resolve_shared(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchaoQuantizationConfig:
    """Weights as torchao's tensors: quantized in memory, multiplied by inputs that are not."""

    weights: TorchaoWeights
    """``"int8"``, symmetric, on any device and differentiable for adapters; or ``"int4"``, with zero points, for
    inference, in the layout of the device where the layer is."""
    group_size: int | None = None
    """Weights of a row that share a scale; it must divide the inputs of every layer. By default a whole row for
    ``"int8"``, and 128 for ``"int4"``, which takes 32, 64, 128 and, not on the CPU, 256."""
    torch_dtype: torch.dtype | str | None = None
    """As in `BnbQuantizationConfig`. ``"int4"`` on an accelerator needs ``bfloat16``."""
    skip_modules: Sequence[str] | None = None
    """As in `BnbQuantizationConfig`."""
    keep_in_fp32_modules: Sequence[str] | None = None
    """As in `BnbQuantizationConfig`."""

    def __post_init__(self) -> None:
        _check_choice("weights", self.weights, get_args(TorchaoWeights))
        if self.weights == "int4":
            _set_default(self, "group_size", 128)
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"`group_size={size!r}` is not a number of weights. Give a positive integer, such as 32.")
        if self.weights == "int4" and size not in _GROUP_SIZES and size is not None:
            raise ConfigError(
                f"`group_size={size}` is no group that the kernels for int4 compute with. "
                f"Use one of {', '.join(map(str, _GROUP_SIZES))}, or `weights='int8'`, which takes any."
            )
        _resolve_shared(self)


QuantizationConfig = BnbQuantizationConfig | TorchaoQuantizationConfig


_MODES = {
    "llm_int8_threshold": "load_in_8bit",
    "bnb_4bit_quant_type": "load_in_4bit",
    "bnb_4bit_use_double_quant": "load_in_4bit",
    "bnb_4bit_compute_dtype": "load_in_4bit",
}


def _check_mode(config: BnbQuantizationConfig) -> None:
    for name, mode in _MODES.items():
        value = getattr(config, name)
        if value is not None and not getattr(config, mode):
            other = "load_in_4bit" if mode == "load_in_8bit" else "load_in_8bit"
            raise ConfigError(
                f"`{name}={value!r}` is a setting of `{mode}` and would do nothing with `{other}=True`. Drop it, or "
                f"give `{mode}=True` instead."
            )


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"`{name}={value!r}` is neither true nor false. Give `True` or `False`.")


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"`{name}={value!r}` is not a type that weights are quantized to here."
            f"{did_you_mean(str(value), list(known))} Use one of {', '.join(known)}."
        )


def _resolve_shared(config: QuantizationConfig) -> None:
    _resolve_dtype(config, "torch_dtype")
    for name in ("skip_modules", "keep_in_fp32_modules"):
        names = getattr(config, name)
        if names is None:
            continue
        if isinstance(names, str) or not all(isinstance(each, str) and each for each in names):
            raise ConfigError(
                f"`{name}={names!r}` is not a list of names of modules. Give one such as `['lm_head']`; `[]` is none."
            )
        object.__setattr__(config, name, tuple(names))


def _resolve_dtype(config: QuantizationConfig, name: str) -> None:
    value = getattr(config, name)
    if value is None:
        return
    dtype = parse_dtype(value)
    if dtype not in _COMPUTE:
        raise ConfigError(
            f"`{name}={value!r}` is no dtype in which the layers of bitsandbytes and torchao compute. Use float32, "
            f"float16 or bfloat16."
        )
    object.__setattr__(config, name, dtype)


def _set_default(config: QuantizationConfig, name: str, value: object) -> None:
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)
