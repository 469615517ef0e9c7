"""Linear layers whose weights are tensors of torchao."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from accel_bigmodel.quantize.backend import require
from accel_bigmodel.quantize.options import TorchaoQuantizationConfig
from accel_state.errors import ConfigError

__all__ = ["TorchaoLayers"]

MINIMUM = "0.17"
"""The first release whose int8 and int4 are both tensors of the current kind."""


class TorchaoLayers:
    """`Backend` of torchao.

    Args:
        config: what is wanted.

    Raises:
        MissingDependencyError: if torchao is not installed.
    """

    def __init__(self, config: TorchaoQuantizationConfig) -> None:
        self._config = config
        require("torchao", MINIMUM, f"`weights={config.weights!r}`")
        self._quantization: Any = importlib.import_module("torchao.quantization")

    def check_layer(self, name: str, layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        size = self._config.group_size
        if size is not None and layer.in_features % size:
            self._refuse(name, layer, f"groups of {size} do not divide its {layer.in_features} inputs")
        if self._config.weights != "int4":
            return
        if device.type == "cpu" and layer.out_features % 16:
            self._refuse(name, layer, f"the CPU packs rows by 16, and it has {layer.out_features} outputs")
        if device.type == "cpu" and size == 256:
            self._refuse(name, layer, "the CPU has no kernel for groups of 256")
        if device.type != "cpu" and dtype != torch.bfloat16:
            self._refuse(name, layer, f"its weight is {dtype}, and on {device.type} int4 is multiplied in bfloat16")

    def _refuse(self, name: str, layer: nn.Linear, reason: str) -> None:
        remedy = "`torch_dtype=torch.bfloat16`" if "bfloat16" in reason else "another `group_size`"
        raise ConfigError(
            f"{name!r} ({layer.in_features} inputs, {layer.out_features} outputs) cannot be quantized by "
            f"`{self._config}`: {reason}. Give {remedy}, `weights='int8'`, or put {name!r} into `skip_modules`."
        )

    def stand_in(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        return layer

    def fill(self, module: Any, weight: torch.Tensor, device: torch.device) -> None:
        alone = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        alone.weight = nn.Parameter(weight.to(device), requires_grad=False)
        self._quantization.quantize_(alone, self._how(device))
        module.weight = nn.Parameter(alone.weight.detach(), requires_grad=False)
        module.register_forward_pre_hook(refuse_training)

    def _how(self, device: torch.device) -> Any:
        """The configuration of torchao's own. None of them may change what inductor is set to elsewhere."""
        size, owned = self._config.group_size, self._quantization
        if self._config.weights == "int8":
            granularity = owned.PerRow() if size is None else owned.PerGroup(size)
            return owned.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False, version=2)
        if device.type != "cpu":
            return owned.Int4WeightOnlyConfig(
                group_size=size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        # The layout of the CPU is in no public place; its name changed between torchao 0.17 and 0.18.
        owned = importlib.import_module("torchao.prototype.quantization.int4")
        made = getattr(owned, "PrototypeInt4WeightOnlyConfig", None) or owned.Int4WeightOnlyOpaqueTensorConfig
        return made(group_size=size, set_inductor_config=False)

    def is_part(self, rest: str) -> bool:
        return False

    def restore(
        self, name: str, module: Any, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        raise ConfigError(
            f"{name!r} is stored as {weight.dtype}: it was quantized before, and no safetensors file has what torchao "
            f"needs besides. Give the weights before they were quantized."
        )

    def mark(self, model: nn.Module) -> None:
        """Nothing: libraries know these weights by their class."""


def refuse_training(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook: torch lets these weights require a gradient, and then none ever comes."""
    weight = module.weight
    if isinstance(weight, torch.Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            f"The weight of a quantized layer ({list(weight.shape)}, {type(weight).__name__}) requires a gradient, but "
            f"a quantized weight gets none and would never be trained. Train adapters on top of it, as with peft, and "
            f"leave it at `requires_grad=False`."
        )
