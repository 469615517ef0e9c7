"""The tensors of one module, brought where they can be looked at, and set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from accel_bigmodel.offload.division import HeldTensor, group_tensors
from accel_bigmodel.offload.hooks import units_of
from accel_bigmodel.offload.offloading import resolve_device
from accel_bigmodel.sizes import named_module_tensors
from accel_state.config import did_you_mean
from accel_state.dtypes import parse_dtype
from accel_state.errors import ConfigError

__all__ = ["align_module_device", "set_module_tensor_to_device"]


@contextmanager
def align_module_device(module: nn.Module, execution_device: torch.device | str | int | None = None) -> Iterator[None]:
    """Within it, the parameters of `module` and of what is in it have values, on the device where they are used.

    What is offloaded is brought as for a forward, and changes made in place are kept. Use it to look at weights, or to
    initialise some.

    Args:
        module: any part of a model.
        execution_device: where parameters that are not offloaded go for the time; by default they stay. What is
            offloaded goes where its forward runs, and nowhere else.

    Raises:
        ConfigError: if `execution_device` is another than that of the module's forward.
    """
    units = units_of(module)
    wanted = None if execution_device is None else resolve_device(execution_device)
    for unit in units:
        if wanted is not None and unit.engine.transfers.device != wanted:
            raise ConfigError(
                f"{unit.name!r} is offloaded and computes on `{unit.engine.transfers.device}`, and was to be brought "
                f"to `{wanted}`. Leave `execution_device` out, or call `remove_hooks` first."
            )
    with ExitStack() as stack:
        for unit in units:
            unit.enter(one_forward=False, is_plain=True)
            stack.callback(unit.leave, keep_all=True)
        if wanted is not None:
            stack.enter_context(_moved(module, wanted, {id(t) for unit in units for t in unit.present()}))
        yield


@contextmanager
def _moved(module: nn.Module, device: torch.device, others: set[int]) -> Iterator[None]:
    held = [each for each in group_tensors(module) if id(each.value) not in others and each.places[0].is_parameter]
    moved = [each for each in held if each.value.device != device]
    for each in moved:
        if each.value.device.type == "meta":
            raise ConfigError(
                f"`{each.name}` is on the meta device and has no values to bring to `{device}`. Load a checkpoint "
                f"first."
            )
        _put(each, nn.Parameter(each.value.detach().to(device), requires_grad=each.value.requires_grad))
    try:
        yield
    finally:
        with torch.no_grad():
            for each in moved:
                each.value.copy_(each.places[0].get())
                _put(each, each.value)


def _put(held: HeldTensor, value: torch.Tensor) -> None:
    for place in held.places:
        place.put(value)


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: torch.device | str | int,
    value: torch.Tensor | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Have a parameter or buffer lie on `device`, with another value or dtype if one is given.

    All modules of `module` that hold the tensor get the new one, so tied weights stay tied. An offloaded one takes a
    new value where it is kept.

    Args:
        module: the whole model, or any part.
        tensor_name: as ``named_parameters`` of `module` shows it.
        device: where to. ``"meta"`` gives the values up.
        value: of the same shape. It is needed where the tensor has none.
        dtype: by default that of the tensor, also where `value` has another one.

    Raises:
        ConfigError: if there is no such tensor, it has no value and none is given, or shapes differ.
    """
    held = next((each for each in group_tensors(module) if tensor_name in each.names), None)
    if held is None:
        known = [name for name, _ in named_module_tensors(module, recurse=True)]
        raise ConfigError(
            f"`{type(module).__name__}` has no parameter or buffer {tensor_name!r}.{did_you_mean(tensor_name, known)} "
            f"Give a name as `named_parameters()` shows it."
        )
    if value is not None and value.shape != held.value.shape:
        raise ConfigError(
            f"`{tensor_name}` has the shape {list(held.value.shape)}, and its new value has {list(value.shape)}. Give "
            f"one of the same shape."
        )
    wanted_dtype = held.value.dtype if dtype is None else parse_dtype(dtype)
    target = torch.device(device) if device == "meta" else resolve_device(device)
    if _set_offloaded(module, held, target, value, wanted_dtype):
        return
    if value is None and held.value.device.type == "meta" and target.type != "meta":
        raise ConfigError(
            f"`{tensor_name}` is on the meta device and has no value that could go to `{target}`. Give its `value`."
        )
    found = (held.value if value is None else value).detach().to(target, wanted_dtype)
    if isinstance(held.value, nn.Parameter):
        found = nn.Parameter(found, requires_grad=held.value.requires_grad)
    _put(held, found)


def _set_offloaded(
    module: nn.Module, held: HeldTensor, device: torch.device, value: torch.Tensor | None, dtype: torch.dtype
) -> bool:
    for unit in units_of(module):
        for position, tensor in enumerate(unit.tensors):
            if tensor.placeholder is held.value:
                if value is None or dtype != held.value.dtype:
                    raise ConfigError(
                        f"`{held.name}` is offloaded: it is on `{unit.engine.transfers.device}` while a forward needs "
                        f"it, and cannot be moved to `{device}` or have another dtype. Give a `value` of its dtype, or "
                        f"call `remove_hooks` first."
                    )
                unit.set_value(position, value)
                return True
    return False
