"""A state of nested values, split into JSON and tensors and put together again, without pickle.

JSON holds ``None``, booleans, integers, floats, strings, lists, and dicts with string keys as they are. What it
cannot hold is written as a dict of one key that begins with ``$``:

==================  =========================================================
``{"$tensor": k}``  tensor number *k* of the file beside it
``{"$tuple": [..]}``  a tuple
``{"$set": [..]}``  a set, in an order of its own
``{"$frozenset": [..]}``  a frozenset, likewise
``{"$dict": [[k, v], ..]}``  a dict whose keys are not all strings, or begin with ``$``
``{"$counter": [[k, v], ..]}``  a ``collections.Counter`` (schedulers keep milestones in one)
``{"$float": "nan"}``  ``nan``, ``inf`` or ``-inf``
``{"$dtype": "float32"}``  a ``torch.dtype``
==================  =========================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from accel_parallel.checkpoint.tensor_file import StoredTensor
from accel_parallel.flat import FlatPart
from accel_state.errors import CheckpointError

__all__ = ["Leaf", "decode", "encode"]

Leaf = torch.Tensor | FlatPart | StoredTensor
"""What counts as a tensor: whole, divided over ranks, or in a file of another checkpoint."""

_CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$dict": dict,
    "$counter": lambda pairs: Counter(dict(pairs)),
}


def encode(tree: Any, *, item: str) -> tuple[Any, dict[str, Leaf]]:
    """Split a state.

    Args:
        tree: what an object's ``state_dict()`` gave.
        item: name of the object, for errors.

    Returns:
        The JSON value, and the tensors by the key that it refers to them with: their path in the tree.

    Raises:
        CheckpointError: naming the path of a value that is neither JSON nor a tensor.
    """
    tensors: dict[str, Leaf] = {}
    return _encode(tree, item, tensors), tensors


def _encode(value: Any, path: str, tensors: dict[str, Leaf]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Leaf):
        key = path
        while key in tensors:  # {"a.b": ..., "a": {"b": ...}} spells one path twice
            key += "'"
        tensors[key] = value
        return {"$tensor": key}
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if isinstance(value, (list, tuple)):
        members = [_encode(member, f"{path}.{index}", tensors) for index, member in enumerate(value)]
        return members if isinstance(value, list) else {"$tuple": members}
    if isinstance(value, (set, frozenset)):
        mark = "$set" if isinstance(value, set) else "$frozenset"
        return {mark: [_encode(member, path, tensors) for member in sorted(value, key=repr)]}
    raise CheckpointError(
        f"`{path}` is a {type(value).__module__}.{type(value).__qualname__}, and a checkpoint holds JSON values and "
        "tensors "
        f"only, never pickled objects. Let `state_dict()` return numbers, strings, lists, dicts or tensors there."
    )


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, Leaf]) -> Any:
    if isinstance(value, Counter):
        return {"$counter": [_encode_pair(key, count, path, tensors) for key, count in value.items()]}
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _encode(member, f"{path}.{key}", tensors) for key, member in value.items()}
    return {"$dict": [_encode_pair(key, member, path, tensors) for key, member in value.items()]}


def _encode_pair(key: Any, member: Any, path: str, tensors: dict[str, Leaf]) -> list[Any]:
    return [_encode(key, path, tensors), _encode(member, f"{path}.{key}", tensors)]


def decode(value: Any, tensors: Mapping[str, Any], *, item: str) -> Any:
    """Put a state together again.

    Raises:
        CheckpointError: if a tensor that the JSON refers to is not there, or a mark is unknown.
    """
    if isinstance(value, list):
        return [decode(member, tensors, item=item) for member in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(member, tensors, item=item) for key, member in value.items()}
    (mark, content), *_ = value.items()
    if mark == "$tensor":
        if content not in tensors:
            raise CheckpointError(
                f"`{item}` refers to the tensor `{content}`, which its tensor file lacks: the two files do not belong "
                f"together. Load another checkpoint."
            )
        return tensors[content]
    if mark == "$float":
        return float(content)
    if mark == "$dtype":
        return _decode_dtype(content, item)
    if mark in _CONTAINERS:
        return _CONTAINERS[mark](decode(content, tensors, item=item))
    raise CheckpointError(
        f"`{item}` holds the mark `{mark}`, which this version does not know. Read it with the version that wrote it."
    )


def _decode_dtype(name: str, item: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"`{item}` holds the dtype `{name}`, which this torch ({torch.__version__}) does not know. "
            f"Read it with the version that wrote it."
        )
    return dtype
