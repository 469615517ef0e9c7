"""What kind of object `prepare` was given."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from accel_data.convert import is_loader
from accel_state.errors import ConfigError
from accel_state.protocols import StatefulLoader

__all__ = ["kind_of"]


def kind_of(index: int, each: Any) -> str:
    """``"model"``, ``"optimizer"``, ``"loader"`` or ``"scheduler"``.

    Args:
        index: of the argument, from 0, for the message.
        each: the argument.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(each, nn.Module):
        return "model"
    if isinstance(each, Optimizer):
        return "optimizer"
    if isinstance(each, StatefulLoader) or is_loader(each):
        return "loader"
    if all(callable(getattr(each, method, None)) for method in ("step", "state_dict", "load_state_dict")):
        return "scheduler"
    raise ConfigError(
        f"`prepare` was given a {type(each).__name__} as argument number {index + 1}, and it prepares models, "
        f"optimizers, data loaders and learning-rate schedulers. Leave it out of the call."
    )
