"""What modules keep besides their tensors (``get_extra_state`` of torch), where a checkpoint has it as a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from accel_bigmodel.loading.delivery import Delivery, whole_of
from accel_bigmodel.loading.source import Source

__all__ = ["ExtraState", "PlannedExtra", "extra_states"]


@dataclass(frozen=True, slots=True, eq=False)
class ExtraState:
    """That of one module."""

    names: tuple[str, ...]
    """As a ``state_dict`` has them; several where the module is in the model several times."""
    module: nn.Module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, slots=True, eq=False)
class PlannedExtra:
    """One that is loaded."""

    of: ExtraState
    source: Source

    def room(self) -> torch.Tensor:
        """Memory for it, on the CPU whatever the default device is: the module puts it where it wants it."""
        return torch.empty(self.source.shape, dtype=self.source.dtype, device="cpu")

    def delivery(self, memory: torch.Tensor) -> Delivery:
        """What fills that."""
        return whole_of(self.source, memory)

    def give(self, memory: torch.Tensor) -> None:
        """Let the module take it."""
        self.of.module.set_extra_state(memory)


def extra_states(model: nn.Module) -> list[ExtraState]:
    """Those of all modules that take any."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            name = f"{prefix}._extra_state" if prefix else "_extra_state"
            found.setdefault(id(module), (module, []))[1].append(name)
    return [ExtraState(tuple(names), module) for module, names in found.values()]
