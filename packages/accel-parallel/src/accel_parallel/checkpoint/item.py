"""One thing to save, and what becomes of it: JSON and tensors by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accel_parallel.checkpoint.codec import Leaf, encode
from accel_parallel.checkpoint.manifest import MANIFEST_NAME
from accel_parallel.checkpoint.tensor_file import StoredTensor
from accel_parallel.flat import FlatPart
from accel_parallel.sharded import is_divided, local_of
from accel_state.errors import CheckpointError, ConfigError
from accel_state.tensor_format import TensorShape, name_of_dtype

__all__ = ["FlatItem", "Item", "flatten"]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_RESERVED = "__metadata__"
"""A key that files of tensors keep for themselves."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to save, in memory."""

    name: str
    """Unique in a checkpoint; the stem of its files."""
    kind: str
    state: Any
    """Nested JSON values and tensors. A flat dict of tensors becomes files of tensors with those keys, and no JSON."""
    shared: bool = False
    """Whether every rank gives it, with the same names and shapes. Its tensors may be divided over ranks, and are then
    dealt out to be written; the rest is the main process's. Any other item is written by the rank that gives it."""

    of: str = ""
    """Class of the object whose state it is, where another class must not take it."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or f"{self.name}.json" == MANIFEST_NAME:
            raise ConfigError(
                f"An item is called {self.name!r}, which cannot be the stem of its files: letters, digits, `_`, `-` "
                f"and inner dots can, and `manifest` is taken. Give it another name."
            )

    @property
    def is_flat(self) -> bool:
        """Whether it is a dict of tensors and nothing else, so that any reader of such files can use it."""
        state = self.state
        if not isinstance(state, Mapping) or not state or _RESERVED in state:
            return False
        return all(isinstance(key, str) and isinstance(value, Leaf) for key, value in state.items())


@dataclass(frozen=True, slots=True)
class FlatItem:
    """An item taken apart."""

    item: Item
    json: bytes | None
    """All of it but its tensors, which it names; ``None`` where it is nothing but tensors."""
    tensors: dict[str, Leaf]
    """Each once, by name."""
    aliases: dict[str, str]
    """Further names of these."""

    @property
    def shapes(self) -> dict[str, TensorShape]:
        """Of the whole tensors."""
        return {name: TensorShape(tuple(leaf.shape), leaf.dtype) for name, leaf in self.tensors.items()}


def flatten(item: Item) -> FlatItem:
    """Take an item apart. Copies no tensor.

    Raises:
        CheckpointError: for a value that cannot be stored, naming it.
    """
    if item.is_flat:
        tree, tensors = None, dict(item.state)
    else:
        tree, tensors = encode(item.state, item=item.name)
    for name, tensor in tensors.items():
        _refuse_unstorable(item, name, tensor)
    distinct, aliases = _split_tied(tensors)
    # An item of no tensors at all still has a file to be known by.
    text = None if item.is_flat and distinct else json.dumps(tree).encode()
    return FlatItem(item, text, distinct, aliases)


def _refuse_unstorable(item: Item, name: str, tensor: Leaf) -> None:
    if isinstance(tensor, StoredTensor):
        return
    if is_divided(tensor) and not item.shared:
        raise CheckpointError(
            f"The tensor `{name}` of `{item.name}` is divided over processes, and only models and optimizers are put "
            f"together. Let `state_dict()` return it whole, on every process, by `tensor.full_tensor()`."
        )
    local = local_of(tensor)
    problem = None
    if local.is_meta:
        problem = "is on the meta device and has no values"
    elif local.layout is not torch.strided:
        problem = f"has the layout {local.layout}, and files hold dense tensors"
    elif local.is_quantized or name_of_dtype(local.dtype) is None:
        problem = f"is {local.dtype}, which files cannot hold"
    if problem is not None:
        raise CheckpointError(
            f"The tensor `{name}` of `{item.name}` {problem}. Let `state_dict()` return it as a dense tensor with "
            f"values, for example `tensor.to_dense()` or `torch.view_as_real(tensor)`."
        )


def _split_tied(tensors: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, str]]:
    """One entry for each tensor that is the same memory under several names."""
    distinct: dict[str, Leaf] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in tensors.items():
        place = _place(tensor)
        if place is not None and place in seen:
            aliases[name] = seen[place]
            continue
        if place is not None:
            seen[place] = name
        distinct[name] = tensor
    return distinct, aliases


def _place(tensor: Leaf) -> Any:
    """What two names of one tensor have in common; ``None`` for one that cannot be told from others."""
    if isinstance(tensor, StoredTensor):
        return (tensor.file.location, tensor.name)
    local = local_of(tensor)
    if not local.numel():
        return None
    begin = tensor.start if isinstance(tensor, FlatPart) else 0
    return (
        local.untyped_storage().data_ptr(), local.storage_offset(), tuple(local.shape), local.stride(), local.dtype,
        str(local.device), local.is_conj(), local.is_neg(), tuple(tensor.shape), begin,
    )  # fmt: skip
