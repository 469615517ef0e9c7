"""Tensors that are divided over ranks, in plain terms: this rank's part, where it lies, and the whole.

torch calls them ``DTensor``; a `FlatPart` is a range of a flattened one. Everything here takes plain tensors too, which
are whole on every rank. What torch has for them is imported where one is at hand, since that takes longer than all of
this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
import torch.distributed as dist
from torch import nn

from accel_parallel.box import Box, boxes_of_range
from accel_parallel.flat import FlatPart

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "Box", "box_of", "in_memory", "is_divided", "is_sharded", "like", "local_of", "owned_pieces",
    "part_of", "read_all", "range_of", "to_copy", "total_norm", "whole",
]  # fmt: skip

_NUM_READERS = 4


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is one of those that are divided over ranks."""
    return hasattr(tensor, "device_mesh")


def is_divided(value: object) -> TypeGuard[DTensor | FlatPart]:
    """Whether this rank holds a part of it only, be it a rectangular one or a range."""
    return isinstance(value, FlatPart) or is_sharded(value)


def local_of(tensor: torch.Tensor | FlatPart) -> torch.Tensor:
    """What this rank holds, sharing its memory; a plain tensor itself."""
    if isinstance(tensor, FlatPart):
        return tensor.local
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor | FlatPart) -> torch.Tensor:
    """All of it, detached. Every rank of its mesh must call this. A plain tensor comes back as it is."""
    if isinstance(tensor, FlatPart):
        return tensor.whole()
    if not is_sharded(tensor):
        return tensor
    full: torch.Tensor = tensor.full_tensor()
    return full.detach()


def box_of(tensor: torch.Tensor) -> Box:
    """Which part of the whole this rank holds."""
    if not is_sharded(tensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in shape:  # torch places an empty part anywhere
        return Box((0,) * len(shape), tuple(shape))
    return Box(tuple(offset), tuple(shape))


def owned_pieces(tensor: torch.Tensor | FlatPart) -> list[tuple[Box, torch.Tensor]]:
    """What this rank is the one to write of a divided tensor, where several hold the same."""
    if isinstance(tensor, FlatPart):
        return tensor.pieces()
    box = box_of(tensor)
    return [(box, local_of(tensor).detach())] if _owns_part(tensor) and not box.is_empty else []


def _owns_part(tensor: torch.Tensor) -> bool:
    if not is_sharded(tensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    copies = [at for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()]
    return not any(copies)


class _Stored(Protocol):
    @property
    def shape(self) -> torch.Size: ...
    def view(self, box: Box | None = None) -> torch.Tensor: ...


def part_of(value: torch.Tensor | _Stored, reference: torch.Tensor) -> torch.Tensor:
    """The part of `value` that this rank holds of `reference`, which has the same shape; only good for copying from.

    Args:
        value: whole, or divided as `reference` is, or stored in files, of which no more than that part is read.
        reference: a divided tensor.
    """
    if not isinstance(value, torch.Tensor):
        return value.view(box_of(reference))
    return value.to_local() if is_sharded(value) else value[box_of(reference).slices]


def range_of(value: torch.Tensor | FlatPart | _Stored, start: int, numel: int) -> torch.Tensor:
    """Elements of a tensor in row-major order, of one dim; from files only those are read.

    Args:
        value: whole, or stored in files, or a range that holds them all.
        start: the first of them.
        numel: how many.
    """
    if isinstance(value, FlatPart):
        return value.local.narrow(0, start - value.start, numel)
    if isinstance(value, torch.Tensor):
        return value.reshape(-1).narrow(0, start, numel)
    boxes = boxes_of_range(value.shape, start, numel)
    return torch.cat([value.view(box).reshape(-1) for box in boxes]) if boxes else torch.empty(0)


def in_memory(value: Any) -> Any:
    """A tensor that is stored in files, read; anything else as it is."""
    return value.read() if isinstance(getattr(value, "shape", None), torch.Size) and hasattr(value, "read") else value


def read_all(read: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """What `read` gives of each set of arguments, several at once: memory that is new takes longest to fill."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return list(pool.map(read, *arguments))


def to_copy(value: Any) -> Any:
    """A tensor that is stored in files, in memory that is only good for copying from; anything else as it is."""
    return value.view() if isinstance(getattr(value, "shape", None), torch.Size) and hasattr(value, "read") else value


def like(local: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """This rank's part `local` as a tensor that is divided as `reference` is."""
    if not is_sharded(reference):
        return local
    from torch.distributed.tensor import DTensor

    made: torch.Tensor = DTensor.from_local(
        local,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )
    return made


def total_norm(gradients: Iterable[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The common norm of gradients, a scalar, as of the whole tensors in one place. Every rank must call this.

    A part that several ranks hold counts once. The norm of a union is the norm of the norms, so each kind of division
    is reduced over the axes that it divides along, and over no others.
    """
    kinds: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        key: Any = None
        if is_sharded(gradient):
            gradient = _without_partial(gradient)
            key = (gradient.device_mesh, gradient.placements)
        kinds.setdefault(key, []).append(local_of(gradient).detach())
    norms = [_norm_of_kind(key, members, norm_type) for key, members in kinds.items()]
    if not norms:
        return torch.zeros(())
    first = norms[0]
    all_kinds: torch.Tensor = torch.stack([norm.to(first.device, first.dtype) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(all_kinds, norm_type)
    return total


def _norm_of_kind(key: Any, members: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    present = [member for member in members if member.numel()]
    dtype = torch.promote_types(members[0].dtype, torch.float32)
    norm = nn.utils.get_total_norm(present, norm_type) if present else torch.zeros((), device=members[0].device)
    norm = norm.to(dtype)
    if key is None:
        return norm
    mesh, placements = key
    largest = norm_type == float("inf")
    power = norm if largest else norm**norm_type
    for axis, placement in enumerate(placements):
        if not placement.is_replicate() and mesh.size(axis) > 1:
            dist.all_reduce(power, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(axis))
    return power if largest else power ** (1.0 / norm_type)


def _without_partial(gradient: DTensor) -> DTensor:
    """Sums that are still spread over ranks, added up."""
    if not any(placement.is_partial() for placement in gradient.placements):
        return gradient
    from torch.distributed.tensor import Replicate

    summed = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
    found: DTensor = gradient.redistribute(placements=summed)
    return found
