"""All optimizers of a foreign checkpoint, as items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from accel_parallel.checkpoint.codec import Leaf
from accel_parallel.checkpoint.item import Item
from accel_parallel.checkpoint_commands.convert.found import Asked, Found, numbered
from accel_parallel.checkpoint_commands.convert.optimizer import Weights, name_state
from accel_state.errors import CheckpointError

__all__ = ["add_optimizers"]


def add_optimizers(found: Found, raw: list[tuple[str, Any]], asked: Asked, *, ordered: bool) -> None:
    """Name the states of optimizers, and add them.

    Args:
        found: holds the models.
        raw: each one's place, and what its `state_dict()` gave.
        asked: names, where the user gives them.
        ordered: whether weights are in the order of the models' state dicts.
    """
    if asked.parameter_names is not None and len(raw) != 1:
        raise CheckpointError(
            f"`--parameter-names` is for the one optimizer of a checkpoint, and this one has {len(raw)}. Leave it out"
            f"{', and convert with optimizers that keep names' if raw else ''}."
        )
    models = found.models()
    tensors = {f"{model}.{name}": each for model, held in models.items() for name, each in _distinct(held).items()}
    weights = Weights(tensors, tuple(models), ordered)
    for index, (where, state) in enumerate(raw):
        content, how, steps = name_state(state, weights, asked.parameter_names, f"`{where}`")
        if how is not None:
            found.notes.append(f"parameters of {where} were named {how}")
        found.items.append(Item(numbered("optimizer", index), "optimizer", content))
        if steps is not None:
            found.step = max(found.step or 0, steps)


def _distinct(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Each tensor under its first name."""
    seen: set[Any] = set()
    distinct = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape)) if isinstance(tensor, torch.Tensor) else id(tensor)
        if place not in seen or 0 in tensor.shape:
            distinct[name] = tensor
        seen.add(place)
    return distinct
