"""What autograd saves of a unit's weights: where to fetch them again, instead of the weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from accel_bigmodel.stream import Load

__all__ = ["SavedWeights", "current_hooks"]

Hooks = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def current_hooks() -> Hooks | None:
    """What looks at saved tensors now, if torch tells."""
    top: Callable[[bool], Hooks | None] | None
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)


class _Weight(NamedTuple):
    """A view of a unit's bytes."""

    load: Load
    position: int
    """Which of its tensors."""
    changes: int
    """How often that one had been changed."""
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Other(NamedTuple):
    """Anything else, as whoever looked at saved tensors before us made of it."""

    packed: Any
    unpack: Callable[[Any], Any]


class SavedWeights:
    """Within it, saved tensors that are a unit's weights keep nothing on the device.

    Backward fetches the unit again when the first of them is used, and the ones that follow ahead of their use. Other
    tensors go to the hooks that were there before, so that activation checkpointing around it works as ever.

    Args:
        load: the unit.
        flat: its bytes on the device now.
    """

    def __init__(self, load: Load, flat: torch.Tensor) -> None:
        self._load = load
        self._address = flat.untyped_storage().data_ptr()
        self._outer = current_hooks()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def _pack(self, tensor: torch.Tensor) -> Any:
        if (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.device.type != "meta"
            and tensor.untyped_storage().data_ptr() == self._address
        ):
            offset = int(tensor.storage_offset())
            index = bisect_right(self._load.source.layout.offsets, offset * tensor.dtype.itemsize) - 1
            changes = self._load.changes[index]
            return _Weight(self._load, index, changes, tensor.dtype, tensor.size(), tensor.stride(), offset)
        if self._outer is None:
            return tensor
        pack, unpack = self._outer
        return _Other(pack(tensor), unpack)


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    if isinstance(packed, _Other):
        found: torch.Tensor = packed.unpack(packed.packed)
        return found
    if packed.load.changes[packed.position] != packed.changes:
        raise RuntimeError(
            f"An offloaded tensor of {packed.load.name!r} that backward needs was changed since the forward: loaded, "
            f"set, or changed in place. Call backward before that, or compute the forward again."
        )
    engine = packed.load.engine
    flat = engine.acquire(packed.load)
    engine.release(packed.load)  # what is returned keeps the memory
    weight: torch.Tensor = flat.view(packed.dtype).as_strided(packed.size, packed.stride, packed.offset)
    return weight
