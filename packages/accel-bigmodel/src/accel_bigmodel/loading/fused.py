"""Stored tensors that a model holds under other names, or several of them fused into one.

transformers 5 keeps the experts of a mixture in one parameter and saves them one by one, as earlier versions did. It
describes how they belong together; here each stored tensor is given its place in the fused one and read right into it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from accel_bigmodel.loading.source import Source
from accel_state.errors import CheckpointError

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor and the place in a tensor of the model that it fills."""

    source: str
    """Name in the checkpoint."""
    place: tuple[int | slice, ...] = ()
    """Index of the place; the whole by default."""


def parts_of(model: nn.Module, sources: Mapping[str, Source], known: Collection[str]) -> dict[str, list[Part]]:
    """For each name of the model, or other name where the model has none such, what is stored of it.

    Raises:
        CheckpointError: if the model's own description of how it is stored asks for more than putting together.
    """
    found: dict[str, list[Part]] = {}
    fused: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    transforms = _transforms(model)
    for name in sources:
        target, pattern, transform = _renamed(name, transforms)
        if target not in known and name in known:
            target, transform = name, None
        if transform is None or target not in known:
            found.setdefault(target if target in known else name, []).append(Part(name))
        else:
            fused.setdefault(target, (transform, {}))[1].setdefault(pattern, []).append(name)
    for target, (transform, collected) in fused.items():
        found.setdefault(target, []).extend(_places(target, transform, collected, sources))
    return found


def _transforms(model: nn.Module) -> list[Any]:
    """How transformers says that `model` is stored; nothing for models of others and for versions that do not say."""
    from_transformers = any(each.__module__.startswith("transformers.") for each in type(model).__mro__)
    if not from_transformers or "transformers" not in sys.modules:
        return []
    try:
        described = import_module("transformers.conversion_mapping").get_model_conversion_mapping
    except (ImportError, AttributeError):  # before version 5
        return []
    return list(described(model))


def _renamed(name: str, transforms: list[Any]) -> tuple[str, str, Any]:
    """The name in the model, and the transform that fuses it with others by a pattern, if one does."""
    renaming = [each for each in transforms if not hasattr(each, "operations")]
    fusing = [each for each in transforms if hasattr(each, "operations")]
    for each in renaming:
        name, _ = each.rename_source_key(name)
    for each in fusing:
        name, pattern = each.rename_source_key(name)
        if pattern is not None:
            return name, pattern, each
    return name, "", None


def _places(
    target: str, transform: Any, collected: Mapping[str, list[str]], sources: Mapping[str, Source]
) -> list[Part]:
    """Place of each stored tensor: stacked along dim 0 by number, then joined along a dim by pattern, or either."""
    steps = [(type(each).__name__, getattr(each, "dim", -1)) for each in transform.operations]
    stacked = bool(steps) and steps[0] == ("MergeModulelist", 0)
    joins = steps[1:] if stacked else steps
    if len(joins) > 1 or any(kind != "Concatenate" or dim < 0 for kind, dim in joins):
        raise CheckpointError(
            f"`{target}` is stored in another form ({', '.join(next(iter(collected.values()))[:2])}, ...), from which "
            f"it is made by {' and '.join(kind for kind, _ in steps)}, and loading in place only puts parts side by "
            f"side. Load it by the model's `from_pretrained`, and save it with `save_original_format=False`."
        )
    # Before they are stacked, dim 0 of the fused one is not there yet.
    dim = joins[0][1] - (1 if stacked else 0) if joins else None
    parts: list[Part] = []
    begin = 0
    for pattern in transform.source_patterns:
        names = sorted(collected.get(pattern, ()), key=_by_number)
        size = 0
        for number, name in enumerate(names):
            shape = sources[name].shape
            inner: tuple[slice, ...] = ()
            if dim is not None and dim < len(shape):
                size = shape[dim]
                inner = (slice(None),) * dim + (slice(begin, begin + size),)
                if not stacked:
                    begin += size
            parts.append(Part(name, (number, *inner) if stacked else inner))
        if stacked:
            begin += size
    return parts


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(each), "") if each.isdecimal() else (-1, each) for each in re.split(r"\.", name)]
