"""Tensors that are divided over ranks, in a checkpoint: each rank writes the parts that it owns, any world reads them.

An item with divided tensors becomes one item of the main process, which says of each tensor where its parts lie, and
for each rank one flat item ``<name>-part<rank>`` with its parts by the tensor's path. A reader asks for a box of a
tensor, and is given it from whichever parts meet that box; so the number of readers does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from accel_parallel.sharded import Box, is_divided, owned_pieces, whole
from accel_state.collectives import gather_object
from accel_state.process import Process

__all__ = ["PART", "StoredPart", "StoredTensor", "divide", "gather", "map_leaves"]

PART = "part"
"""Kind of the items that hold parts."""

ReadBox = Callable[[str, str, Box], torch.Tensor]
"""From the name of an item and a key in it to a box of that tensor."""


class StoredPart(NamedTuple):
    """Where a part of a tensor is."""

    item: str
    """That holds it."""
    key: str
    """Of it, in that item."""
    box: Box
    """Where it lies in the whole."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose parts lie in files, read when a box of it is asked for."""

    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[StoredPart, ...]
    """They do not overlap."""
    read_box: ReadBox | None = None
    """Set by the checkpoint that it was read from."""

    def read(self, box: Box | None = None) -> torch.Tensor:
        """A part of it on the CPU, by default all; only the bytes that are needed are read."""
        assert self.read_box is not None
        box = box or Box((0,) * len(self.shape), tuple(self.shape))
        target = torch.empty(box.shape, dtype=self.dtype)
        for part in self.parts:
            common = box.meet(part.box)
            if common is not None:
                target[common.within(box).slices] = self.read_box(part.item, part.key, common.within(part.box))
        return target

    def bound_to(self, read_box: ReadBox) -> StoredTensor:
        """The same, read by this function."""
        return replace(self, read_box=read_box)


def divide(name: str, tree: Any, *, process: Process) -> tuple[Any, dict[str, torch.Tensor]]:
    """Every rank must call this. Take the divided tensors out of a state.

    Args:
        name: of the item.
        tree: the state, alike on every rank but for the parts of its tensors.
        process: the open process.

    Returns:
        The state with a `StoredTensor` for each divided tensor, and this rank's parts by key.
    """
    boxes: dict[str, list[tuple[str, Box]]] = {}
    own: dict[str, torch.Tensor] = {}

    def collect(path: str, value: Any) -> Any:
        if is_divided(value):
            pieces = owned_pieces(value)
            keys = [path if len(pieces) == 1 else f"{path}[{number}]" for number in range(len(pieces))]
            boxes[path] = [(key, box) for key, (box, _) in zip(keys, pieces, strict=True)]
            own.update({key: piece for key, (_, piece) in zip(keys, pieces, strict=True)})
        return value

    map_leaves(tree, collect)
    of_ranks = gather_object([boxes], process=process) if process.topology.world_size > 1 else [boxes]

    def stored(path: str, value: Any) -> Any:
        if not is_divided(value):
            return value
        parts = tuple(
            StoredPart(f"{name}-part{rank}", key, box)
            for rank, found in enumerate(of_ranks)
            for key, box in found[path]
        )
        return StoredTensor(torch.Size(value.shape), value.dtype, parts)

    return map_leaves(tree, stored), own


def gather(tree: Any, *, keep: bool) -> Any:
    """Every rank must call this. Divided tensors whole, on the host, one after the other.

    Args:
        tree: a state, alike on every rank but for the parts of its tensors.
        keep: whether this rank wants them; the others get ``None`` there, and hold one at a time.
    """

    def gathered(_: str, value: Any) -> Any:
        if not is_divided(value):
            return value
        full = whole(value)
        return full.cpu() if keep else None

    return map_leaves(tree, gathered)


def map_leaves(tree: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """A state of dicts, lists and tuples with each leaf replaced by what `change` makes of its path and value."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(value, change, f"{path}.{key}" if path else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        members: Sequence[Any] = [map_leaves(value, change, f"{path}.{n}") for n, value in enumerate(tree)]
        return list(members) if isinstance(tree, list) else tuple(members)
    return change(path, tree)
