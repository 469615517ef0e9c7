"""What modules keep besides their tensors (``get_extra_state`` of torch), among the entries of a ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from accel_parallel.sharded import in_memory

__all__ = ["give_extra_states", "is_extra"]


def is_extra(name: str) -> bool:
    """Whether the entry of that name is one, and no tensor that could be copied into."""
    return name.rpartition(".")[2] == "_extra_state"


def give_extra_states(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let modules take theirs, in memory of their own. Called once tensors are in place, for they may look at those."""
    for name, value in state.items():
        if is_extra(name):
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(in_memory(value))
