"""Models whose parameters take no memory, or are made on the device where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from accel_state.errors import ConfigError

__all__ = ["init_empty_weights", "init_on_device"]


def init_empty_weights(include_buffers: bool = False) -> AbstractContextManager[None]:
    """A context in which parameters are made on the meta device: shapes and dtypes without memory.

    Use it to look at a model that does not fit, and to fill it from a checkpoint afterwards. See `init_on_device` for
    what holds inside.

    Args:
        include_buffers: whether buffers are made there too. By default they keep their values, as checkpoints often
            leave them out.
    """
    return init_on_device("meta", include_buffers=include_buffers)


@contextmanager
def init_on_device(device: torch.device | str | int, *, include_buffers: bool = False) -> Iterator[None]:
    """A context in which parameters of modules are made on `device`.

    Each parameter is moved at the moment when a module takes it, so that no more than one lies on the host at a time,
    and the initialisation that follows runs on `device`. Tied parameters stay tied. Only the thread that entered it is
    concerned, and torch is as it was before once it is left, by an exception too. It can be nested: a parameter then
    ends on the innermost device, but not on a real one inside ``meta``, where its values are gone.

    Args:
        device: where parameters go.
        include_buffers: whether buffers go there too. Then every tensor is made on `device` from the start, also those
            that are not kept; a constructor that reads their values, as with ``item()``, fails on the meta device.

    Raises:
        ConfigError: if a parameter that a module takes is on the meta device and `device` is another: it has no values
            to move.
    """
    wanted = torch.device(device)
    if wanted.type not in ("cpu", "meta") and wanted.index is None:
        wanted = torch.empty(0, device=wanted).device
    owner = threading.get_ident()
    moved = WeakTensorKeyDictionary()

    def move(module: nn.Module, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.device == wanted or threading.get_ident() != owner:
            return None
        if tensor.device.type == "meta":
            raise ConfigError(
                f"`{type(module).__name__}.{name}` is on the meta device and has no values that could go to "
                f"{str(wanted)!r}: it was made inside `init_empty_weights`, or with `device='meta'`. Leave "
                f"`init_empty_weights` first, or make it without values by `init_on_device('meta')`."
            )
        if tensor not in moved:
            moved[tensor] = _on_device(tensor, wanted)
        result: torch.Tensor = moved[tensor]
        return result

    # The hooks see what every module of the process takes; they are torch's own and cost nothing once removed.
    hooks: list[Callable[..., Any]] = [register_module_parameter_registration_hook]
    with ExitStack() as stack:
        if include_buffers:
            hooks.append(register_module_buffer_registration_hook)
            stack.enter_context(wanted)
        for register in hooks:
            stack.callback(register(move).remove)
        yield


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter or buffer like `tensor` on `device`: of its class, with its attributes."""
    if is_lazy(tensor):
        made: torch.Tensor = type(tensor)(requires_grad=tensor.requires_grad, device=device, dtype=tensor.dtype)  # type: ignore[call-arg]
    else:
        made = tensor.detach().to(device)
        if nn.Parameter in type(tensor).__mro__:
            made = torch.Tensor._make_subclass(type(tensor), made, tensor.requires_grad)
        elif isinstance(tensor, nn.Parameter):  # a tensor of another class that was marked as a parameter
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made
