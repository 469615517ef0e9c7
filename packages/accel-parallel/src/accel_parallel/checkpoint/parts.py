"""Tensors that are divided over ranks, in a checkpoint: each rank writes the parts that it owns, any world reads them.

An item with divided tensors becomes one item of the main process, which says of each tensor where its parts lie, and
for each rank one flat item ``<name>-part<rank>`` with its parts by the tensor's path. A reader asks for a box of a
tensor, and is given it from whichever parts meet that box; so the number of readers does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel_parallel.sharded import Box, box_of, is_sharded, local_of, owns_part, whole
from accel_state.collectives import gather_object
from accel_state.process import Process

__all__ = ["PART", "StoredTensor", "divide", "gather", "map_leaves"]

PART = "part"
"""Kind of the items that hold parts."""

ReadBox = Callable[[str, str, Box], torch.Tensor]
"""From the name of an item and a key in it to a box of that tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose parts lie in files, read when a box of it is asked for."""

    key: str
    """Of its parts, in the items that hold them."""
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[tuple[str, Box], ...]
    """For each part, the item that holds it and where it lies in the whole. They do not overlap."""
    read_box: ReadBox | None = None
    """Set by the checkpoint that it was read from."""

    def read(self, box: Box | None = None) -> torch.Tensor:
        """A part of it on the CPU, by default all; only the bytes that are needed are read."""
        assert self.read_box is not None
        box = box or Box((0,) * len(self.shape), tuple(self.shape))
        target = torch.empty(box.shape, dtype=self.dtype)
        for item, place in self.parts:
            common = box.meet(place)
            if common is not None:
                target[common.within(box).slices] = self.read_box(item, self.key, common.within(place))
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
    found: dict[str, torch.Tensor] = {}
    map_leaves(tree, lambda path, value: found.setdefault(path, value) if is_sharded(value) else value)
    own = {path: tensor for path, tensor in found.items() if owns_part(tensor) and not box_of(tensor).is_empty}
    if process.topology.world_size > 1:
        of_ranks: list[dict[str, Box]] = gather_object([{path: box_of(t) for path, t in own.items()}], process=process)
    else:
        of_ranks = [{path: box_of(tensor) for path, tensor in own.items()}]
    places: dict[str, list[tuple[str, Box]]] = {path: [] for path in found}
    for rank, boxes in enumerate(of_ranks):
        for path, box in boxes.items():
            places[path].append((f"{name}-part{rank}", box))

    def stored(path: str, value: Any) -> Any:
        if not is_sharded(value):
            return value
        return StoredTensor(path, torch.Size(value.shape), value.dtype, tuple(places[path]))

    return map_leaves(tree, stored), {path: local_of(tensor).detach() for path, tensor in own.items()}


def gather(tree: Any, *, keep: bool) -> Any:
    """Every rank must call this. Divided tensors whole, on the host, one after the other.

    Args:
        tree: a state, alike on every rank but for the parts of its tensors.
        keep: whether this rank wants them; the others get ``None`` there, and hold one at a time.
    """

    def gathered(_: str, value: Any) -> Any:
        if not is_sharded(value):
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
