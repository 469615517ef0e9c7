"""Which tensors of a model travel together, and whose forward needs them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from accel_bigmodel.offload.tensor import Place, holders
from accel_bigmodel.tied import tensor_identity
from accel_state.blocks import find_blocks, outermost
from accel_state.errors import ConfigError

__all__ = ["Group", "HeldTensor", "divide", "group_tensors", "travelling"]


@dataclass(slots=True, eq=False)
class HeldTensor:
    """One tensor with all modules that hold it."""

    name: str
    """The first of its names."""
    value: torch.Tensor
    places: list[Place]
    names: list[str]


@dataclass(slots=True)
class Group:
    """Tensors that travel together."""

    name: str
    modules: list[nn.Module]
    """Whose forwards need them."""
    tensors: list[HeldTensor] = field(default_factory=list)


def group_tensors(model: nn.Module) -> list[HeldTensor]:
    """Parameters and buffers of `model`, each once however many names it has, in the order of the model."""
    found: dict[Hashable, HeldTensor] = {}
    for name, place, value in holders(model):
        held = found.setdefault((place.is_parameter, tensor_identity(value)), HeldTensor(name, value, [], []))
        held.places.append(place)
        held.names.append(name)
    return list(found.values())


def travelling(tensors: Sequence[HeldTensor], *, offload_buffers: bool) -> list[HeldTensor]:
    """Those of a model's `tensors` that may leave the device between forwards.

    Buffers stay unless they are asked for, as they are small. What is trained stays: parameters that require gradients
    in a model that has others which do not, such as adapters. Where all of them do, as in a model that was just made or
    loaded, nobody said that it is to be trained, and all travel.
    """
    parameters = [each for each in tensors if each.places[0].is_parameter]
    frozen = [each for each in parameters if not each.value.requires_grad]
    travels = set(frozen or parameters)
    if offload_buffers:  # sparse ones have no bytes that could lie in one piece
        travels |= {each for each in tensors if not each.places[0].is_parameter and each.value.layout == torch.strided}
    return [each for each in tensors if each in travels]


def divide(
    model: nn.Module, tensors: Iterable[HeldTensor], *, preload_module_classes: Collection[str] | None = None
) -> list[Group]:
    """The groups of `tensors`, in the order of the model.

    What a block holds (`find_blocks`) travels with the block. What lies outside of blocks travels with the module that
    holds it, or with the nearest one around it that somebody calls. What several of these share, as an output layer
    does with the embedding, travels by itself, and is there when one of them needs it.

    Args:
        model: whose modules are called.
        tensors: from `group_tensors`, those that travel.
        preload_module_classes: names of classes whose modules take everything in them along, for modules that read the
            weights of their children without calling these.

    Raises:
        ConfigError: for a class that no module has.
    """
    homes = _homes(model, preload_module_classes)
    groups: dict[tuple[str, ...], Group] = {}
    for tensor in tensors:
        names = tuple(dict.fromkeys(homes[name.rpartition(".")[0]] for name in tensor.names))
        if names not in groups:
            modules = [model.get_submodule(name) for name in names]
            title = names[0] if len(names) == 1 else " + ".join(name or type(model).__name__ for name in names)
            groups[names] = Group(title or type(model).__name__, modules)
        groups[names].tensors.append(tensor)
    return list(groups.values())


def _homes(model: nn.Module, preload_module_classes: Collection[str] | None) -> dict[str, str]:
    """For each module the one whose forward brings its tensors."""
    blocks = {name for name, _ in outermost(find_blocks(model))}
    if preload_module_classes:
        wanted = set(preload_module_classes)
        chosen = [(name, module) for name, module in model.named_modules() if type(module).__name__ in wanted]
        missing = wanted - {type(module).__name__ for _, module in chosen}
        if missing:
            raise ConfigError(
                f"`preload_module_classes` names {', '.join(sorted(map(repr, missing)))}, but no module of "
                f"`{type(model).__name__}` is of that class. Give names of classes as `type(module).__name__` has them."
            )
        blocks |= {name for name, _ in chosen}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent = name.rpartition(".")[0] if name else None
        around = found.get(parent) if parent is not None else None
        if around is not None and around in blocks:
            found[name] = around
        elif name in blocks or parent is None or _is_called(module, model.get_submodule(parent)):
            found[name] = name
        else:
            found[name] = around or ""
    return found


def _is_called(module: nn.Module, parent: nn.Module) -> bool:
    """Whether somebody calls the module: attention reads the weights of its parts without calling these."""
    return type(module).forward is not nn.Module.forward and not isinstance(parent, nn.MultiheadAttention)
