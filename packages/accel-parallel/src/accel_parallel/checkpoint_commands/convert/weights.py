"""Weights of a model in one file or several, of safetensors or of `torch.save`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from accel_parallel.checkpoint.codec import Leaf
from accel_parallel.checkpoint.folder import LocalFolder
from accel_parallel.checkpoint.tensor_file import TensorFile
from accel_parallel.checkpoint_commands.convert.foreign import load
from accel_state.errors import CheckpointError

__all__ = ["read_weights", "strip"]


def read_weights(path: Path) -> dict[str, Leaf]:
    """Tensors by name, none of them in memory yet where the file allows that.

    Args:
        path: a file of weights, or an index that says which file holds which.

    Raises:
        CheckpointError: if a file is missing, damaged, or holds something else.
    """
    if path.name.endswith(".index.json"):
        found: dict[str, Leaf] = {}
        for name in _indexed(path):
            found.update(read_weights(path.with_name(name)))
        return found
    try:
        if path.suffix == ".safetensors":
            return dict(TensorFile(LocalFolder(path.parent), path.name).tensors())
        content = load(path)
    except OSError as error:
        raise CheckpointError(f"`{path}` could not be read ({error}). Restore it, then convert again.") from error
    odd = _odd(content)
    if odd is not None:
        raise CheckpointError(
            f"`{path}` holds {odd}, and weights are tensors by name. Name the folder of another checkpoint."
        )
    return dict(content)


def _odd(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return next((f"{key!r}" for key, each in content.items() if not isinstance(each, torch.Tensor)), None)


def _indexed(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{path}` is no index of weights ({error!r}). Restore it first.") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"`{path}` names `{name}`, which lies outside of its folder. Do not use it.")
    return names


def strip(tensors: Mapping[str, Leaf], prefix: str) -> dict[str, Leaf] | None:
    """Without a prefix that all names begin with; ``None`` where one does not."""
    if not tensors or not all(name.startswith(prefix) for name in tensors):
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
