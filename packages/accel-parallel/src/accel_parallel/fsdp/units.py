"""Which modules are gathered at once, what stays out of it, and what cannot be sharded. Reads no values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
from accel_parallel.sharded import is_sharded
from accel_state.blocks import find_blocks
from accel_state.errors import ConfigError

__all__ = ["check_ignored", "check_separate", "check_shardable", "ignored_parameters", "plan_units"]


def plan_units(
    model: nn.Module, plugin: FullyShardedDataParallelPlugin, *, ignored: Iterable[torch.Tensor] = ()
) -> list[tuple[str, nn.Module]]:
    """The modules to shard one by one, inner ones first; the model itself, which takes the rest, is not among them.

    A weight that is tied between two modules belongs to both, and can be in one unit only: units that would part it
    are left out, so that it ends up in the one around them.

    Raises:
        ConfigError: for a class that the model does not have, or a model that cannot say what its units are.
    """
    outside = {id(parameter) for parameter in ignored}
    chosen = [
        (name, module)
        for name, module in _chosen(model, plugin)
        if any(id(parameter) not in outside for parameter in module.parameters())
    ]
    units = _keep_ties_together(model, chosen)
    return units[::-1]  # `named_modules` names a module before those inside it


def _chosen(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> list[tuple[str, nn.Module]]:
    policy, classes, least = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap, plugin.min_num_params
    if policy == "no_wrap":
        return []
    if callable(policy):
        chosen = [(name, module) for name, module in model.named_modules() if module is not model and policy(module)]
        for name, module in chosen:
            if type(module).forward is nn.Module.forward:
                raise ConfigError(
                    f"`auto_wrap_policy` chose `{name}`, a {type(module).__name__}, which has no forward, so that it "
                    f"would never be gathered. Choose modules that are called, such as those inside it."
                )
        return chosen
    if classes is not None or least is not None:
        return find_blocks(model, classes=classes, min_num_params=None if least is None else int(least))
    found = find_blocks(model)
    if policy == "transformer_based_wrap" and not found:
        raise ConfigError(
            f"`auto_wrap_policy='transformer_based_wrap'` found no repeated layers in {type(model).__name__}, and no "
            f"classes were named. Set `transformer_cls_names_to_wrap`, or 'no_wrap' to gather the model at once."
        )
    return found


def _keep_ties_together(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    tied = [names for names in places.values() if len(names) > 1]
    kept = dict(chosen)
    while True:
        parted = {
            unit
            for names in tied
            if len(homes := {_home(name, kept) for name in names}) > 1
            for unit in homes
            if unit is not None and not all(_inside(name, unit) for name in names)
        }
        if not parted:
            return list(kept.items())
        for unit in parted:
            del kept[unit]


def _home(parameter: str, units: Iterable[str]) -> str | None:
    """The innermost unit that a parameter of this name is in; ``None`` for the model itself."""
    return max((unit for unit in units if _inside(parameter, unit)), key=len, default=None)


def _inside(parameter: str, unit: str) -> bool:
    return parameter.startswith(f"{unit}.")


def ignored_parameters(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> set[nn.Parameter]:
    """Parameters that stay whole.

    Raises:
        ConfigError: if one of them is trained, for its gradient would differ between processes.
    """
    modules: Sequence[nn.Module]
    if isinstance(plugin.ignored_modules, str):
        pattern = re.compile(plugin.ignored_modules)
        modules = [module for name, module in model.named_modules() if pattern.fullmatch(name)]
    else:
        modules = tuple(plugin.ignored_modules or ())
    own = {id(parameter) for parameter in model.parameters()}
    wanted = {id(p) for module in modules for p in module.parameters()} | {id(p) for p in plugin.ignored_params or ()}
    found = {parameter for parameter in model.parameters() if id(parameter) in wanted & own}
    for name, parameter in model.named_parameters():
        if parameter in found and parameter.requires_grad:
            raise ConfigError(
                f"`{name}` is ignored by sharding and yet trained, and nobody averages the gradients of what is "
                f"ignored, so that it would become another one on each process. Freeze it with "
                f"`requires_grad_(False)`, or let it be sharded."
            )
    return found


def check_ignored(models: Sequence[nn.Module], plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse settings that ignore nothing in any of the models that are prepared together.

    Raises:
        ConfigError: with names that there are.
    """
    if plugin.ignored_modules is None and plugin.ignored_params is None:
        return
    if not models or any(ignored_parameters(model, plugin) for model in models):
        return
    kinds = ", ".join(type(model).__name__ for model in models)
    if isinstance(plugin.ignored_modules, str):
        raise ConfigError(
            f"`ignored_modules={plugin.ignored_modules!r}` names no module with parameters of {kinds}. The names are "
            f"those of `named_modules()`, such as {_some_names(models[0])}, and are matched in full."
        )
    raise ConfigError(
        f"`ignored_modules` and `ignored_params` hold no parameter of {kinds}, so everything would be sharded. Give "
        f"those of the model that is prepared, not of a copy; several models are prepared in one call."
    )


def check_separate(models: Sequence[nn.Module]) -> None:
    """Refuse models that share a parameter, which is in the shards of one of them only.

    Raises:
        ConfigError: naming it in both.
    """
    places: dict[int, tuple[int, str]] = {}
    for number, model in enumerate(models):
        for name, parameter in model.named_parameters():
            first, known_as = places.setdefault(id(parameter), (number, name))
            if first != number:
                raise ConfigError(
                    f"`{name}` of the {type(model).__name__} is `{known_as}` of the {type(models[first]).__name__}, "
                    f"and a parameter can be in the shards of one model only. Prepare one module that holds both, "
                    f"such as an `nn.ModuleDict`, or give each a copy."
                )


def check_shardable(model: nn.Module, units: Sequence[tuple[str, nn.Module]], ignored: set[nn.Parameter]) -> None:
    """Refuse what would fail at the first step.

    Raises:
        ConfigError: for parameters on several devices, without dims, of another sharding or with sparse gradients; and
            for a unit that trains parameters of several dtypes, which are gathered and reduced together.
    """
    _refuse_tensors(model, ignored)
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        if parameter not in ignored:
            devices.setdefault(parameter.device, name)
    real = {device: name for device, name in devices.items() if device.type != "meta"}
    if len(real) > 1:
        where = ", ".join(f"`{name}` on {device}" for device, name in real.items())
        raise ConfigError(
            f"The model is spread over several devices ({where}), and each process shards its copy from one device. "
            f"Load it without a device map, for example on the CPU."
        )
    owner: dict[str, str] = {}
    names = dict(units)
    for name, parameter in model.named_parameters():
        if parameter in ignored or not parameter.requires_grad:
            continue
        home = _home(name, names) or ""
        first = owner.setdefault(home, name)
        other = model.get_parameter(first)
        if other.dtype != parameter.dtype:
            unit = f"The unit `{home}`" if home else "What no unit takes"
            raise ConfigError(
                f"{unit} trains `{first}` in {other.dtype} and `{name}` in {parameter.dtype}, and the gradients of a "
                f"unit are reduced together in one dtype. Convert one of them, or choose units that keep them apart."
            )


def _refuse_tensors(model: nn.Module, ignored: set[nn.Parameter]) -> None:
    for name, parameter in model.named_parameters():
        if parameter not in ignored and not len(parameter.shape):
            raise ConfigError(
                f"`{name}` is a single number without dims, and shards are cut along the first dim. "
                f"Make it a tensor of shape (1,), or freeze it and name it in `ignored_params`."
            )
        if is_sharded(parameter):
            raise ConfigError(
                f"`{name}` is divided over processes already ({parameter.placements} on {parameter.device_mesh}). "
                f"Pass the model before anything of it is, and give `parallelism_config` what it should be."
            )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ConfigError(
                f"`{name}` has sparse gradients (`sparse=True`), and those of a unit are reduced together as dense "
                f"ones. Leave `sparse` out, or freeze it."
            )


def _some_names(model: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in list(model.named_modules())[1:4]) or "none at all"
