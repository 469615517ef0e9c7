"""Operations over tensors in nested structures: lists, tuples, mappings, dataclasses, and what is built of them.

A structure is rebuilt with its own type, and only where something in it changed: where nothing did, the very
same object comes back. Anything that is neither a tensor nor a container is a leaf and is left alone.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from accel_state.errors import ConfigError

__all__ = [
    "concatenate",
    "convert_to_fp32",
    "find_batch_size",
    "find_device",
    "map_tensors",
    "send_to_device",
    "slice_tensors",
    "tensor_leaves",
    "tree_signature",
]

_HALF = frozenset({torch.float16, torch.bfloat16})


def map_tensors(
    tree: Any, fn: Callable[[torch.Tensor], Any], *, on_other: Callable[[Any, str], Any] | None = None
) -> Any:
    """`tree` with every tensor replaced by what `fn` gives for it.

    Args:
        tree: a tensor, or containers of tensors and other leaves.
        fn: called once a tensor, in order.
        on_other: called with each other leaf and its path, such as ``[0].labels``, and gives what to put there;
            by default such leaves stay.
    """
    return _map(tree, fn, on_other, "")


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """All tensors of `tree`, in order."""
    return [leaf for _, leaf in _leaves(tree, "") if isinstance(leaf, torch.Tensor)]


def send_to_device(
    tree: Any, device: torch.device | str | int, *, non_blocking: bool = False, skip_keys: Collection[str] = ()
) -> Any:
    """`tree` on `device`; the very same objects where nothing has to move.

    An object with a ``to`` method of its own, such as a tokenizer's batch or a packed sequence, is moved by that.

    Args:
        tree: a tensor, or containers of tensors and other leaves.
        device: where to.
        non_blocking: let the host go on while memory is copied; only pinned memory really does. Not handed to a
            ``to`` that does not take it.
        skip_keys: entries of mappings, at any depth, that stay where they are.
    """
    if isinstance(tree, torch.Tensor):
        return tree.to(device, non_blocking=non_blocking)
    if not (skip_keys and isinstance(tree, Mapping)):
        to = getattr(tree, "to", None)
        if callable(to) and not isinstance(tree, type):
            return to(device, non_blocking=True) if non_blocking and _accepts(to, "non_blocking") else to(device)
    items = _items(tree)
    if items is None:
        return tree
    mapping = isinstance(tree, Mapping)
    moved = [
        child
        if mapping and key in skip_keys
        else send_to_device(child, device, non_blocking=non_blocking, skip_keys=skip_keys)
        for key, child in items
    ]
    return _rebuild(tree, items, moved)


def find_batch_size(tree: Any) -> int | None:
    """Rows of the first tensor that has a dimension; ``None`` where there is no such tensor."""
    for _, leaf in _leaves(tree, ""):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    return None


def find_device(tree: Any) -> torch.device | None:
    """Device of the first tensor; ``None`` where there is none."""
    return next((leaf.device for _, leaf in _leaves(tree, "") if isinstance(leaf, torch.Tensor)), None)


def slice_tensors(tree: Any, rows: slice) -> Any:
    """`tree` with only some rows of each tensor. Tensors without a dimension stay whole."""
    return map_tensors(tree, lambda tensor: tensor[rows] if tensor.dim() > 0 else tensor)


def convert_to_fp32(tree: Any) -> Any:
    """`tree` with float16 and bfloat16 tensors in float32; others stay."""
    return map_tensors(tree, lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor)


def concatenate(trees: Sequence[Any], *, dim: int = 0) -> Any:
    """One tree of the tensors of several, joined along `dim`. All must have one structure.

    Raises:
        ConfigError: if there is nothing to join, or the structures or the leaves that are no tensors differ.
    """
    if not trees:
        raise ConfigError(
            "No tree was given to `concatenate`, so there is no structure to give back. Give at least one."
        )
    return trees[0] if len(trees) == 1 else _concatenate(trees, dim, "")


def tree_signature(tree: Any, *, free_dim: int | None = None) -> dict[str, str]:
    """Structure, shapes and dtypes of `tree`: JSON text by path, so that two of them are compared with ``==``.

    ``{"": "dict[2]", ".ids": "int64[8, 128]", ".name": "str"}``

    Args:
        tree: what to describe.
        free_dim: a dimension whose size may differ; it is shown as ``*``.
    """
    return dict(_describe(tree, "", free_dim))


def _items(tree: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children of a container; ``None`` for a leaf."""
    if isinstance(tree, (list, tuple)):
        return list(enumerate(tree))
    if isinstance(tree, Mapping):
        return list(tree.items())
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return None


def _rebuild(tree: Any, items: list[tuple[Any, Any]], children: list[Any]) -> Any:
    """A container like `tree` with these children, or `tree` itself where they are the ones it has."""
    if all(new is old for new, (_, old) in zip(children, items, strict=True)):
        return tree
    kind = type(tree)
    if kind is dict:
        return {key: new for (key, _), new in zip(items, children, strict=True)}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*children)
    if isinstance(tree, (list, tuple)):
        return kind(children)
    changed = {key: new for (key, old), new in zip(items, children, strict=True) if new is not old}
    if isinstance(tree, MutableMapping):
        # A shallow copy keeps what else the object holds: a default factory, a tokenizer's encodings.
        made = copy.copy(tree)
        for key, new in changed.items():
            made[key] = new
        return made
    if isinstance(tree, Mapping):
        return kind({key: new for (key, _), new in zip(items, children, strict=True)})
    made = copy.copy(tree)
    for key, new in changed.items():
        object.__setattr__(made, key, new)  # frozen ones too; their __post_init__ has had its say
    return made


def _map(tree: Any, fn: Callable[[torch.Tensor], Any], on_other: Callable[[Any, str], Any] | None, path: str) -> Any:
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    items = _items(tree)
    if items is None:
        return tree if on_other is None else on_other(tree, path)
    return _rebuild(tree, items, [_map(child, fn, on_other, path + _step(tree, key)) for key, child in items])


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = None if isinstance(tree, torch.Tensor) else _items(tree)
    if items is None:
        yield path, tree
        return
    for key, child in items:
        yield from _leaves(child, path + _step(tree, key))


def _describe(tree: Any, path: str, free_dim: int | None) -> Iterator[tuple[str, str]]:
    if isinstance(tree, torch.Tensor):
        sizes = [str(size) for size in tree.shape]
        if free_dim is not None and -tree.dim() <= free_dim < tree.dim():
            sizes[free_dim] = "*"
        yield path, f"{str(tree.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"
        return
    items = _items(tree)
    if items is None:
        yield path, type(tree).__name__
        return
    yield path, f"{type(tree).__name__}[{len(items)}]"
    for key, child in items:
        yield from _describe(child, path + _step(tree, key), free_dim)


def _concatenate(trees: Sequence[Any], dim: int, path: str) -> Any:
    first = trees[0]
    if any(type(tree) is not type(first) for tree in trees):
        kinds = ", ".join(type(tree).__name__ for tree in trees)
        raise _different(path, kinds)
    if isinstance(first, torch.Tensor):
        return torch.cat(list(trees), dim=dim) if first.dim() > 0 else torch.stack(list(trees))
    items = _items(first)
    if items is None:
        if any(tree != first for tree in trees):
            raise _different(path, ", ".join(repr(tree) for tree in trees[:4]))
        return first
    columns = [_items(tree) or [] for tree in trees]
    if any([key for key, _ in column] != [key for key, _ in items] for column in columns):
        raise _different(path, "; ".join(str([key for key, _ in column]) for column in columns[:4]))
    joined = [
        _concatenate([column[index][1] for column in columns], dim, path + _step(first, key))
        for index, (key, _) in enumerate(items)
    ]
    return _rebuild(first, items, joined)


def _different(path: str, what: str) -> ConfigError:
    return ConfigError(
        f"The trees given to `concatenate` differ at {path or 'the top'} ({what}), and only tensors can be joined. "
        f"Give trees of one structure, or join the differing part yourself."
    )


def _step(tree: Any, key: Any) -> str:
    return f"[{key}]" if isinstance(tree, (list, tuple)) else f".{key}"


def _accepts(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C without a signature
        return False
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
