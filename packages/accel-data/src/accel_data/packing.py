"""Trees of tensors as bytes: a skeleton that says what lies where, small tensors in a row, large ones as they are."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from accel_state.errors import ConfigError
from accel_state.tree import map_tensors

__all__ = ["SMALL_BYTES", "Packed", "as_bytes", "pack", "unpack"]

SMALL_BYTES = 16 * 1024
"""Up to here a tensor is copied next to the others rather than sent by itself: on loopback, eight of 1 KiB took 166 µs
one by one and 109 µs together; at 16 KiB it made no difference."""

_UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)
"""What ``pickle`` raises for an object that it cannot write, depending on the object."""


class Packed(NamedTuple):
    """A tree, ready to be sent."""

    skeleton: bytes
    """The tree with a note of dtype and shape in place of each tensor, pickled."""
    small: list[torch.Tensor]
    """uint8, one-dimensional: what goes in a row, in order. Their sizes are in the skeleton."""
    large: list[torch.Tensor]
    """uint8, one-dimensional: the memory of the others, in order; not copied where they are dense."""


class _Place:
    """Stands for a tensor in a skeleton. No container, so that walks over trees take it for a leaf."""

    __slots__ = ("dtype", "is_large", "is_pinned", "order", "requires_grad", "shape")

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        order: tuple[int, ...] | None,
        requires_grad: bool,
        is_pinned: bool,
        is_large: bool,
    ) -> None:
        self.dtype = dtype
        self.shape = shape  # as it lies in memory: permuted by `order` where that is not None
        self.order = order
        self.requires_grad = requires_grad
        self.is_pinned = is_pinned
        self.is_large = is_large

    def __reduce__(self) -> Any:
        return _Place, (self.dtype, self.shape, self.order, self.requires_grad, self.is_pinned, self.is_large)

    def make(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A new tensor as the one that stood here, and its memory as bytes."""
        made = torch.empty(self.shape, dtype=self.dtype, pin_memory=self.is_pinned)
        data = as_bytes(made)
        if self.order is not None:
            made = made.permute([self.order.index(dim) for dim in range(len(self.order))])
        return (made.requires_grad_() if self.requires_grad else made), data


def pack(tree: Any, *, apart_from: Sequence[torch.Tensor] = ()) -> Packed:
    """Take a tree apart, for `unpack` to put it together in another process.

    Containers, as `accel_state.tree` knows them, and all leaves that are no plain tensors are pickled; the memory of
    the tensors is not. What autograd knows of a tensor stays behind. A tensor on a device goes, and arrives, on the
    host. One that is dense in another order of its dims (``channels_last``) keeps it; others become contiguous.

    Args:
        tree: any nesting of containers, with tensors and anything that pickles as leaves.
        apart_from: large tensors that share memory with one of these are copied.

    Raises:
        ConfigError: for a tensor without plain memory (sparse, nested, quantized, meta), and for a leaf that does
            not pickle.
    """
    small: list[torch.Tensor] = []
    large: list[torch.Tensor] = []
    kept = [_extent(tensor) for tensor in apart_from if tensor.device.type == "cpu" and tensor.layout is torch.strided]

    def take(tensor: torch.Tensor) -> Any:
        if type(tensor) is not torch.Tensor:  # knows by itself what it is made of, so it is pickled
            return tensor
        lying, order = _lying(_plain(tensor))
        data = as_bytes(lying)
        is_large = data.numel() > SMALL_BYTES
        if is_large and _meets(_extent(data), kept):
            data = data.clone()
        (large if is_large else small).append(data)
        return _Place(lying.dtype, tuple(lying.shape), order, tensor.requires_grad, tensor.is_pinned(), is_large)

    skeleton = map_tensors(tree, take)
    try:
        return Packed(pickle.dumps(skeleton, protocol=5), small, large)
    except _UNPICKLABLE:
        map_tensors(skeleton, lambda tensor: tensor, on_other=_refuse_unpicklable)
        raise


def unpack(skeleton: bytes, row: torch.Tensor, fetch: Callable[[torch.Tensor], None]) -> Any:
    """Put together what `pack` took apart. Tensors are new, writable, and each has memory of its own.

    Args:
        skeleton: of the `Packed`.
        row: uint8, its small tensors one behind the other.
        fetch: called with the memory of each large one, uint8, in order, to be filled then or later.
    """
    begin = 0

    def put(leaf: Any, path: str) -> Any:
        nonlocal begin
        if not isinstance(leaf, _Place):
            return leaf
        made, data = leaf.make()
        if leaf.is_large:
            fetch(data)
        else:
            end = begin + data.numel()
            data.copy_(row[begin:end])
            begin = end
        return made

    return map_tensors(pickle.loads(skeleton), lambda tensor: tensor, on_other=put)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor: uint8, one-dimensional."""
    flat = tensor.view(-1)
    if flat.stride(0) != 1:  # of at most one element, where the stride says nothing, but `view` wants it to be 1
        flat = flat.as_strided((flat.numel(),), (1,))
    return flat.view(torch.uint8)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The values of `tensor` in memory of the host."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        layout = str(tensor.layout).removeprefix("torch.")
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"{tensor.device} {layout}"
        raise ConfigError(
            f"Rank 0 read a {kind} tensor of {tensor.dtype}, and only tensors with plain memory can be dispatched to "
            f"other ranks. Make it a dense one (`.to_dense()`, or padded) in `collate_fn`, "
            f"or set `dispatch_batches=False`."
        )
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.detach().cpu() if tensor.device.type != "cpu" else tensor.detach()


def _lying(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """`tensor` with its dims in the order in which they lie in memory, and that order; ``None`` where it is as is."""
    if tensor.is_contiguous():
        return tensor, None
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    lying = tensor.permute(order)
    return (lying, order) if lying.is_contiguous() else (tensor.contiguous(), None)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last address, exclusive."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _meets(extent: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(extent[0] < end and begin < extent[1] for begin, end in others)


def _refuse_unpicklable(leaf: Any, path: str) -> Any:
    try:
        pickle.dumps(leaf, protocol=5)
    except _UNPICKLABLE as error:
        raise ConfigError(
            f"Rank 0 read a {type(leaf).__name__} at {path or 'the top'} of a batch, which cannot be pickled "
            f"({error}) and so cannot be dispatched to other ranks. Leave it out in `collate_fn`, or set "
            f"`dispatch_batches=False`."
        ) from error
    return leaf
