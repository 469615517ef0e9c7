"""Memory of an optimizer's state that a restored one can go to, so that none has to be had anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from accel_parallel.sharded import is_divided, is_sharded, local_of

__all__ = ["fits", "room_in"]


def room_in(optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> dict[tuple[str, str], torch.Tensor]:
    """Entries that may be overwritten, by the name of their parameter and their key.

    Those that share memory with another entry, a parameter or its gradient are left out: what is written to one would
    change the other. So are those of classes that keep more than values, such as quantized ones, and those whose value
    is a sum over ranks, of which no rank holds a part.
    """
    found = {
        (names[parameter], key): entry
        for parameter, entries in optimizer.state.items()
        if parameter in names
        for key, entry in entries.items()
        if type(entry) is torch.Tensor or is_sharded(entry)
    }
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held += [parameter.grad for parameter in held if parameter.grad is not None]
    uses = Counter(_memory(each) for each in [*held, *_tensors(list(optimizer.state.values()))])
    return {place: entry for place, entry in found.items() if _is_whole(entry) and uses[_memory(entry)] == 1}


def fits(value: Any, room: torch.Tensor) -> bool:
    """Whether a whole tensor, in memory or stored in files, can be copied there as it is."""
    return (
        not is_divided(value)
        and getattr(value, "shape", None) == room.shape
        and getattr(value, "dtype", None) == room.dtype
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All in it, as those in the lists of L-BFGS."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """Where it lies; ``None`` where that is nowhere to be told apart by."""
    local = local_of(tensor)
    try:
        address = local.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a class that wraps several tensors has no memory of its own
        return None
    return (local.device, address) if address else None


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether it is all of its memory, each element once."""
    local = local_of(tensor)
    return (
        not (is_sharded(tensor) and any(each.is_partial() for each in tensor.placements))
        and _memory(tensor) is not None
        and not tensor.requires_grad
        and local.untyped_storage().nbytes() == local.numel() * local.element_size()
    )
