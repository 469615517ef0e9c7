"""Memory for the tensors of a model, made before anything is read."""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from accel_bigmodel.loading.model_tensor import ModelTensor, is_sharded
from accel_bigmodel.sizes import format_bytes
from accel_state.errors import ConfigError

__all__ = ["allocate", "check_plain", "like", "prefer_large_pages"]

LARGE_BYTES = 4 << 20
"""From which on memory of the host is asked to be in large pages."""


def check_plain(each: ModelTensor) -> None:
    """Refuse classes of tensors that have no memory of their own to read into.

    Raises:
        ConfigError: for those.
    """
    tensor = each.tensor
    if is_sharded(tensor):
        if tensor.device.type == "meta":
            raise ConfigError(
                f"`{each.name}` is sharded and on the meta device, and its parts have no memory to read into. Call "
                f"`model.to_empty(device=...)` after sharding, then load."
            )
    elif is_traceable_wrapper_subclass(tensor) or tensor.is_quantized or tensor.layout != torch.strided:
        raise ConfigError(
            f"`{each.name}` is a {type(tensor).__name__}, which plain weights cannot be read into. Load into the model "
            f"before it is converted, or use `load_and_quantize_model`."
        )


def allocate(
    wanted: Sequence[tuple[str, tuple[int, ...], torch.dtype, torch.device]], *, large_pages: bool = False
) -> list[torch.Tensor]:
    """A tensor without values for each name, shape, dtype and device; each has memory of its own.

    An accelerator's memory is asked for once: what is given back at once to torch's allocator serves all of them, as
    asking the driver for each takes longer than to fill it.

    Raises:
        ConfigError: if a device has no room.
    """
    totals: Counter[torch.device] = Counter()
    for _, shape, dtype, device in wanted:
        # Multiples of what the caching allocator deals in, so that the whole never comes out smaller than the parts.
        totals[device] += -(-torch.Size(shape).numel() * dtype.itemsize // 512) * 512
    made = []
    reserved: set[torch.device] = set()
    for name, shape, dtype, device in wanted:
        try:
            if device.type != "cpu" and device not in reserved:
                reserved.add(device)
                _reserve(totals[device], device)
            tensor = torch.empty(shape, dtype=dtype, device=device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ConfigError(
                f"{format_bytes(totals[device])} are to be loaded to {str(device)!r}, and at `{name}` no memory was "
                f"left there. Map less to it (`accel plan` shows what fits), free what lies there, or give a smaller "
                f"`dtype`."
            ) from error
        if large_pages and device.type == "cpu":
            prefer_large_pages(tensor)
        made.append(tensor)
    return made


def _reserve(size_bytes: int, device: torch.device) -> None:
    """Make the allocator own so much memory in one piece, if there is one; in parts it may still be there."""
    try:
        torch.empty(size_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return


def prefer_large_pages(tensor: torch.Tensor) -> None:
    """Have the system back memory of the host that is not used yet by large pages, where it does so when asked.

    Each page costs a fault when it is first written, and of small ones there are 512 times as many: faults then take
    longer than the reading. Where a host has to back the page first, though, a large one takes the longer.
    """
    size = tensor.untyped_storage().nbytes()
    advise = _madvise()
    if size < LARGE_BYTES or advise is None:
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_HUGEPAGE))  # best effort


def _madvise() -> Callable[..., Any] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found: Callable[..., Any] | None = getattr(ctypes.CDLL(None), "madvise", None)
    return found


def like(old: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """A parameter or buffer of the class and with the attributes of `old` that has `memory`."""
    made = memory
    if nn.Parameter in type(old).__mro__:
        made = torch.Tensor._make_subclass(type(old), memory, old.requires_grad)
    elif isinstance(old, nn.Parameter):  # a tensor of another class that was marked as a parameter
        made = nn.Parameter(memory, requires_grad=old.requires_grad)
    made.__dict__.update(old.__dict__)
    return made
