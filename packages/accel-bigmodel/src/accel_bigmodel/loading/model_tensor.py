"""The tensors of a model as loading sees them: each once, with all of its names."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from accel_bigmodel.tied import tensor_identity
from accel_state.errors import ConfigError

__all__ = ["ModelTensor", "is_sharded", "model_tensors", "put"]


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether this rank has a part of it. Where nobody imported that class, which takes long, nothing is of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(slots=True, eq=False)
class ModelTensor:
    """A parameter or buffer."""

    names: tuple[str, ...]
    """In the order of the model; several where it is tied."""
    tensor: torch.Tensor
    """What the model holds."""
    is_saved: bool
    """Whether a ``state_dict`` has it: a parameter or a persistent buffer."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def is_parameter(self) -> bool:
        """And no buffer."""
        return isinstance(self.tensor, nn.Parameter)


def model_tensors(model: nn.Module) -> list[ModelTensor]:
    """Every parameter and buffer, in the order of the model, parameters first.

    Raises:
        ConfigError: if one has no shape yet.
    """
    groups: dict[Hashable, list[tuple[str, torch.Tensor, bool]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                _check_shaped(start + key, parameter)
                groups.setdefault((True, tensor_identity(parameter)), []).append((start + key, parameter, True))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                _check_shaped(start + key, buffer)
                saved = key not in module._non_persistent_buffers_set
                groups.setdefault((False, tensor_identity(buffer)), []).append((start + key, buffer, saved))
    found = [
        ModelTensor(tuple(name for name, _, _ in group), group[0][1], any(saved for _, _, saved in group))
        for group in groups.values()
    ]
    return sorted(found, key=lambda each: not each.is_parameter)


def _check_shaped(name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise ConfigError(
            f"`{name}` has no shape yet ({type(tensor).__name__}), so what is stored cannot be compared with it. Call "
            f"the model once, then load."
        )


def put(model: nn.Module, names: tuple[str, ...], tensor: torch.Tensor) -> None:
    """Let `tensor` be what all of `names` name, which are names of parameters or all of buffers."""
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        slots = module._parameters if key in module._parameters else module._buffers
        slots[key] = tensor  # type: ignore[assignment]
