"""Linear layers of bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from accel_bigmodel.quantize.backend import require
from accel_bigmodel.quantize.options import BnbQuantizationConfig
from accel_state.errors import CheckpointError, ConfigError

__all__ = ["BitsandbytesLayers"]

MINIMUM = "0.48"
"""The first release whose kernels for the CPU take every type of `BnbQuantizationConfig`."""

_STATE_KEY = "quant_state.bitsandbytes__"


class BitsandbytesLayers:
    """`Backend` of bitsandbytes.

    Args:
        config: what is wanted.

    Raises:
        MissingDependencyError: if bitsandbytes is not installed.
    """

    def __init__(self, config: BnbQuantizationConfig) -> None:
        self._config = config
        mode = "load_in_8bit" if config.load_in_8bit else "load_in_4bit"
        self._nn: Any = require("bitsandbytes", MINIMUM, f"`{mode}=True`").nn

    def check_layer(self, name: str, layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConfigError(
                f"The weight of {name!r} is {dtype}, which bitsandbytes does not quantize. Give "
                f"`torch_dtype=torch.bfloat16`, or put {name!r} into `skip_modules`."
            )

    def stand_in(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        config, shape = self._config, (layer.in_features, layer.out_features)
        made: Any
        if config.load_in_8bit:
            made = self._nn.Linear8bitLt(
                *shape, bias=False, has_fp16_weights=False, threshold=config.llm_int8_threshold, device="meta"
            )
        else:
            made = self._nn.Linear4bit(
                *shape,
                bias=False,
                compute_dtype=config.bnb_4bit_compute_dtype or dtype,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                device="meta",
            )
            # Its fast path for CPUs with AVX512-BF16 packs the weight anew in the first forward that needs no gradient.
            # It fails for sizes that are no multiple of 32, computes in bfloat16 whatever `compute_dtype` says, and has
            # no gradient, so that training after an evaluation fails (bitsandbytes 0.50).
            if hasattr(made, "support_avx512bf16_for_cpu"):
                made.support_avx512bf16_for_cpu = False
        made.bias = layer.bias
        made.train(layer.training)
        result: nn.Module = made
        return result

    def fill(self, module: Any, weight: torch.Tensor, device: torch.device) -> None:
        held = module.weight
        # Both are quantized by being moved, also from the CPU to the CPU; `weight` itself stays as it is.
        if self._config.load_in_8bit:  # quantized only on the way from the CPU
            module.weight = self._nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        else:
            module.weight = self._nn.Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=held.compress_statistics,
                quant_type=held.quant_type,
                quant_storage=held.quant_storage,
                module=module,
            ).to(device)

    def is_part(self, rest: str) -> bool:
        return rest in ("SCB", "weight_format") if self._config.load_in_8bit else rest.startswith("weight.")

    def restore(
        self, name: str, module: Any, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        if self._config.load_in_8bit:
            self._restore_8bit(name, module, weight, parts, device)
        else:
            self._restore_4bit(name, module, weight, parts, device)

    def _restore_8bit(
        self, name: str, module: Any, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        if "SCB" not in parts:
            raise ConfigError(
                f"{name!r} is stored as {weight.dtype} without the scales of bitsandbytes' 8-bit layers, `{name}.SCB`: "
                f"something else quantized it. Give the weights before they were quantized."
            )
        self._check_shape(name, module, tuple(weight.shape))
        made = self._nn.Int8Params(weight.to(device, copy=True), requires_grad=False, has_fp16_weights=False)
        made.CB, made.SCB = made.data, parts["SCB"].to(device, copy=True)
        module.weight = made

    def _restore_4bit(
        self, name: str, module: Any, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        config = self._config
        stats = {rest.removeprefix("weight."): each.clone() for rest, each in parts.items()}
        if _STATE_KEY + str(config.bnb_4bit_quant_type) not in stats:
            types = [each.removeprefix(_STATE_KEY) for each in stats if each.startswith(_STATE_KEY)]
            remedy = f"`bnb_4bit_quant_type={types[0]!r}`, or " if types else ""
            raise ConfigError(
                f"{name!r} is stored as {types[0] if types else weight.dtype}, and "
                f"`bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}` asks for another type. Give {remedy}the weights "
                f"before they were quantized."
            )
        made = self._nn.Params4bit.from_prequantized(
            weight.clone(), stats, requires_grad=False, device=device, module=module
        )
        self._check_shape(name, module, tuple(made.quant_state.shape))
        if made.compress_statistics != config.bnb_4bit_use_double_quant:
            raise ConfigError(
                f"{name!r} is stored {'with' if made.compress_statistics else 'without'} double quantization, and "
                f"`bnb_4bit_use_double_quant={config.bnb_4bit_use_double_quant}` asks for the contrary. Give "
                f"`bnb_4bit_use_double_quant={made.compress_statistics}`."
            )
        module.weight = made
        module.compute_dtype = config.bnb_4bit_compute_dtype or config.torch_dtype or made.quant_state.dtype

    def _check_shape(self, name: str, module: Any, stored: tuple[int, ...]) -> None:
        if stored != (module.out_features, module.in_features):
            raise CheckpointError(
                f"{name!r} is {list(stored)} in the checkpoint and {[module.out_features, module.in_features]} in the "
                f"model. The model was made with another configuration than the one that was saved: make it with the "
                f"same."
            )

    def mark(self, model: nn.Module) -> None:
        # The attributes by which peft knows whose layers to put its adapters on.
        model.is_loaded_in_8bit = self._config.load_in_8bit  # type: ignore[assignment]
        model.is_loaded_in_4bit = self._config.load_in_4bit  # type: ignore[assignment]
