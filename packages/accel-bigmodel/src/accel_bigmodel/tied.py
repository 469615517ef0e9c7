"""Parameters that have several names: found, and tied again after loading or moving took them apart."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import nn

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["find_tied_parameters", "retie_parameters", "tensor_identity"]


def find_tied_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of names under which one tensor is found, each in the order of the model; parameters and buffers.

    On the meta device, tensors are one if they are one object. Elsewhere also if they are views of the same elements of
    the same memory in the same order; views that overlap otherwise, such as the parts of a flat buffer, are not tied,
    nor is a parameter with a buffer that shares its memory.
    """
    groups: dict[Hashable, list[str]] = {}
    for name, tensor in _every_name(model):
        groups.setdefault((isinstance(tensor, nn.Parameter), tensor_identity(tensor)), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def retie_parameters(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Make all names of each group the same object again.

    The first name that has values gives them to the others; with none, all on the meta device, the first one does.

    Args:
        model: changed in place.
        groups: as `find_tied_parameters` gave them, for this model or one like it.

    Raises:
        ConfigError: if a name is not in the model, or the tensors of a group differ in kind, shape, dtype or value, so
            that tying them would lose something.
    """
    for group in groups:
        slots = [_slot(model, name) for name in group]
        tensors = [slot[key] for slot, key in slots]
        held = [(name, tensor) for name, tensor in zip(group, tensors, strict=True) if tensor is not None]
        if not held:
            continue
        source_name, source = next((each for each in held if each[1].device.type != "meta"), held[0])
        for name, tensor in held:
            _check_same(source_name, source, name, tensor)
        for slot, key in slots:
            slot[key] = source


def tensor_identity(tensor: torch.Tensor) -> Hashable:
    """A key that is equal for two tensors exactly if they are one, while both are alive."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return id(tensor)
    try:
        address = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # classes of tensors that hold others and have no memory of their own
        return id(tensor)
    if address == 0:
        return id(tensor)
    return (tensor.device, address, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _every_name(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _slot(model: nn.Module, name: str) -> tuple[dict[str, torch.Tensor | None], str]:
    """The dictionary of a module that holds the tensor `name`, and its key there."""
    path, _, key = name.rpartition(".")
    module: nn.Module | None = model
    for part in path.split(".") if path else []:
        module = None if module is None else module._modules.get(part)
    for slots in () if module is None else (module._parameters, module._buffers):
        if key in slots:
            return slots, key  # type: ignore[return-value]
    known = [each for each, _ in _every_name(model)]
    raise ConfigError(
        f"{name!r} was to be tied, but the {type(model).__name__} has no parameter or buffer of that name."
        f"{did_you_mean(name, known)} Give groups that `find_tied_parameters` found in a model like this one."
    )


def _check_same(source_name: str, source: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    if tensor is source:
        return
    described = [
        f"{'parameter' if isinstance(each, nn.Parameter) else 'buffer'}, {each.dtype}, {list(each.shape)}"
        for each in (source, tensor)
    ]
    if described[0] != described[1]:
        raise ConfigError(
            f"{source_name!r} ({described[0]}) and {name!r} ({described[1]}) were to be tied, but one tensor cannot be "
            f"both. Give both one kind, dtype and shape, or leave them untied."
        )
    if tensor.device.type != "meta" and tensor_identity(tensor) != tensor_identity(source):
        with torch.no_grad():
            if not torch.equal(tensor.to(source.device), source):
                raise ConfigError(
                    f"{source_name!r} and {name!r} were to be tied, but hold different values, and those of {name!r} "
                    f"would be lost. Load one of them only, or leave them untied."
                )
