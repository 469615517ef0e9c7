"""Parameters by name: the key that survives wrapping, sharding and reordering."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["parameter_names"]


def parameter_names(models: Sequence[tuple[str, nn.Module]]) -> dict[torch.Tensor, str]:
    """Name every parameter of some unwrapped models, as ``<model>.<fully qualified name>``.

    Args:
        models: the name that each model has in a checkpoint, and the model.

    Returns:
        One name a parameter, the first that it is found under where it is tied.
    """
    names: dict[torch.Tensor, str] = {}
    for item, model in models:
        for name, parameter in model.named_parameters():
            names.setdefault(parameter, f"{item}.{name}")
    return names
