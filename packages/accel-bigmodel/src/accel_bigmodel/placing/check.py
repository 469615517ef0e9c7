"""Device maps proved against the model they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from accel_bigmodel.placing.census import census
from accel_bigmodel.placing.chain import Chain
from accel_bigmodel.placing.cost import PlaceUse, Problem
from accel_bigmodel.placing.kept import kv_of_layers
from accel_bigmodel.placing.memory import UNLIMITED, get_max_memory, is_store, place_key, shown_place
from accel_bigmodel.placing.plan import Plan, with_disk
from accel_bigmodel.placing.workload import Machine, Workload
from accel_bigmodel.sizes import format_bytes, named_module_tensors
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["check_device_map", "plan_of_map"]


def check_device_map(
    model: nn.Module,
    device_map: Mapping[str, int | str | torch.device],
    *,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    offload_buffers: bool = False,
    main_device: int | str | torch.device | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    tied_parameters: Iterable[Sequence[str]] | None = None,
) -> None:
    """Prove that `device_map` places all of `model`, and nothing in two places.

    The longest name that a tensor begins with decides where it lies; ``""`` is the whole model.

    Args:
        model: any module, also on the meta device.
        device_map: names of modules or of tensors to places.
        max_memory: budgets that the map has to keep, see `get_max_memory`. By default none are checked.
        no_split_module_classes: as for `infer_auto_device_map`, as are all that follow.
        dtype: only used with `max_memory`.
        special_dtypes: likewise.
        offload_buffers: likewise.
        main_device: likewise.
        workload: likewise.
        machine: likewise.
        tied_parameters: tensors that have to lie together, besides those that are one already.

    Raises:
        ConfigError: if the map names an unknown module or place, misses a tensor, splits a module that stays whole,
            separates tied tensors, or exceeds a budget.
    """
    plan = plan_of_map(
        model,
        device_map,
        max_memory=max_memory,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        special_dtypes=special_dtypes,
        offload_buffers=offload_buffers,
        main_device=main_device,
        workload=workload,
        machine=machine,
        tied_parameters=tied_parameters,
    )
    if max_memory is not None:
        for use in plan.prediction.uses:
            if use.used_bytes > use.budget_bytes:
                _refuse_budget(plan, use)


def plan_of_map(
    model: nn.Module,
    device_map: Mapping[str, int | str | torch.device],
    *,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    offload_buffers: bool = False,
    main_device: int | str | torch.device | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    tied_parameters: Iterable[Sequence[str]] | None = None,
) -> Plan:
    """What a map costs. Raises as `check_device_map` does, except for budgets, which may be exceeded."""
    places = _read_places(device_map)
    _check_known(model, places)
    chain = census(
        model,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        special_dtypes=special_dtypes,
        tied_parameters=tied_parameters,
    )
    layers = _place_layers(model, chain, places)
    _check_ties(chain, places)
    used = list(dict.fromkeys(layers))
    budgets = _budgets(used, max_memory)
    main = None if main_device is None else place_key(main_device, setting="main_device")
    _check_computes(used, main, budgets)
    problem = Problem(
        chain,
        budgets,
        main=main,
        workload=workload,
        machine=machine,
        offload_buffers=offload_buffers,
        kv_bytes=kv_of_layers(chain, getattr(model, "config", None), workload),
    )
    numbers = {place: number for number, place in enumerate(problem.places)}
    return Plan(problem=problem, placement=tuple(numbers[layers[unit.layers[0]]] for unit in chain.units))


def _read_places(device_map: Any) -> dict[str, int | str]:
    if not isinstance(device_map, Mapping) or not device_map:
        raise ConfigError(
            f"`device_map={device_map!r}` is no mapping from names of modules to places. Give one, such as "
            f"`infer_auto_device_map(model)` makes."
        )
    for name in device_map:
        if not isinstance(name, str):
            raise ConfigError(f"`device_map` has the key {name!r}, which is no name of a module. Give text.")
    return {name: place_key(place, setting=f"device_map[{name!r}]") for name, place in device_map.items()}


def _check_known(model: nn.Module, places: Mapping[str, Any]) -> None:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if places.keys() <= known:
        return
    known |= {name for name, _ in named_module_tensors(model, recurse=True)}
    for name in places:
        if name not in known:
            raise ConfigError(
                f"`device_map` places {name!r}, but the {type(model).__name__} has no module or tensor of that name."
                f"{did_you_mean(name, sorted(known))} Give names as `model.named_modules()` shows them."
            )


def _place_layers(model: nn.Module, chain: Chain, places: Mapping[str, int | str]) -> list[int | str]:
    """Where each layer lies; it is an error if a part of one lies elsewhere or nowhere."""
    within = _keys_within(chain, places)
    found: list[int | str] = []
    missed: list[str] = []
    for layer in chain.layers:
        place = _lookup(layer.name, places)
        inner = within.get(layer.name, {})
        if place is None and not inner:
            if layer.total_bytes or _holds_tensors(model, layer.name):
                missed.append(layer.name)
            found.append("")
            continue
        _check_whole(model, layer.name, layer.kind, place, inner)
        found.append(place if place is not None else next(iter(inner.values())))
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        raise ConfigError(
            f"`device_map` says nothing about {', '.join(f'`{name}`' for name in missed[:3])}{more}, so where that "
            f"lies is not known. Add it, or a module above it; the key '' is the whole model."
        )
    return _with_neighbours(found)


def _with_neighbours(found: list[int | str]) -> list[int | str]:
    """Layers that hold nothing and that a map leaves out run where the one before them lies."""
    known = next(place for place in found if place != "")
    for number, place in enumerate(found):
        if place == "":
            found[number] = known
        known = found[number]
    return found


def _keys_within(chain: Chain, places: Mapping[str, int | str]) -> dict[str, dict[str, int | str]]:
    """Keys of the map that name parts of a layer, by layer."""
    names = {layer.name for layer in chain.layers}
    found: dict[str, dict[str, int | str]] = {}
    for key, place in places.items():
        above = key.rpartition(".")[0]
        while above:
            if above in names:
                found.setdefault(above, {})[key] = place
                break
            above = above.rpartition(".")[0]
    return found


def _check_whole(
    model: nn.Module, name: str, kind: str, place: int | str | None, inner: Mapping[str, int | str]
) -> None:
    if not inner or (set(inner.values()) == {place}):
        return
    tensors = [f"{name}.{each}" for each, _ in named_module_tensors(model.get_submodule(name), recurse=True)]
    held: dict[int | str | None, str] = {}
    for tensor in tensors:
        held.setdefault(_lookup(tensor, {name: place, **inner} if place is not None else inner), tensor)
    if None in held:
        raise ConfigError(
            f"`device_map` places parts of `{name}` ({kind}), but not `{held[None]}`. Place `{name}` as a whole."
        )
    if len(held) > 1:
        (one, first), (two, second) = list(held.items())[:2]
        raise ConfigError(
            f"`device_map` puts `{first}` on {one!r} and `{second}` on {two!r}, but both belong to `{name}`, and a "
            f"{kind} is not split: it runs as a whole. Place `{name}`, or give `no_split_module_classes` without "
            f"{kind!r} if its parts may lie apart."
        )


def _holds_tensors(model: nn.Module, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    module: Any = model.get_submodule(parent)
    part = module._modules.get(own)
    return part is None or next(named_module_tensors(part, recurse=True), None) is not None


def _lookup(name: str, places: Mapping[str, int | str]) -> int | str | None:
    """The place of the longest key that `name` begins with."""
    while True:
        if name in places:
            return places[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def _check_ties(chain: Chain, places: Mapping[str, int | str]) -> None:
    for group in chain.ties:
        held = {name: _lookup(name, places) for name in group}
        if len(set(held.values())) > 1:
            told = ", ".join(f"`{name}` on {place!r}" for name, place in held.items())
            raise ConfigError(
                f"`device_map` puts {told}, but these are one tensor, and in two places it would be two. Place the "
                f"modules that share it together, or untie them first."
            )


def _budgets(used: Sequence[int | str], max_memory: Mapping[int | str, int | str] | None) -> dict[int | str, int]:
    if max_memory is None:
        order = sorted(used, key=lambda place: (is_store(place), place == "disk", str(place)))
        return dict.fromkeys(order, UNLIMITED)
    budgets = with_disk(get_max_memory(max_memory))
    for place in used:
        if place not in budgets:
            raise ConfigError(
                f"`device_map` uses {shown_place(place)}, for which `max_memory` gives no size. Add it there, or move "
                f"what lies there."
            )
    return budgets


def _check_computes(used: Sequence[int | str], main: int | str | None, budgets: dict[int | str, int]) -> None:
    """Put the main place first if only it computes and the map does not name it."""
    devices = [place for place in budgets if not is_store(place)]
    if main is not None and not is_store(main) and main not in budgets:
        budgets_before = dict(budgets)
        budgets.clear()
        budgets.update({main: UNLIMITED, **budgets_before})
    elif main is not None and main not in (devices or ["cpu"]):
        raise ConfigError(
            f"`main_device={main!r}` cannot run what `device_map` keeps elsewhere: beside accelerators it only keeps "
            f"weights. Use one of {', '.join(map(repr, devices))}."
        )
    elif not devices and "cpu" not in budgets:
        budgets_before = dict(budgets)
        budgets.clear()
        budgets.update({"cpu": UNLIMITED, **budgets_before})


def _refuse_budget(plan: Plan, use: PlaceUse) -> None:
    parts = {
        "weights": use.weight_bytes,
        "keys and values": use.kv_bytes,
        "activations": use.activation_bytes,
        "slots for streamed layers": use.staging_bytes,
    }
    told = ", ".join(f"{format_bytes(size)} of {what}" for what, size in parts.items() if size)
    largest = max(use.layers, key=lambda each: plan.chain.layers[each].total_bytes, default=None)
    named = f" The largest layer there is `{plan.chain.layers[largest].name}`." if largest is not None else ""
    raise ConfigError(
        f"`device_map` puts {told} on {shown_place(use.place)}, {format_bytes(use.used_bytes)} in all, and "
        f"`max_memory` gives it {format_bytes(use.budget_bytes)}.{named} Move layers for "
        f"{format_bytes(use.used_bytes - use.budget_bytes)} elsewhere, or give it more."
    )
