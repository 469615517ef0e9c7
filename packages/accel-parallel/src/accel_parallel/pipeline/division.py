"""Which stage of a pipeline gets which parts of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel_parallel.pipeline.cast import Cast
from accel_parallel.pipeline.rehearsal import Route, rehearse
from accel_parallel.pipeline.split import check_split_points, plan_split_points
from accel_state.blocks import find_blocks, outermost
from accel_state.errors import ConfigError

__all__ = ["Division", "divide", "owners_of"]


@dataclass(frozen=True, slots=True)
class Division:
    """A model divided into stages, its weights still in one place."""

    cast: Cast
    starts: tuple[str, ...]
    """Names of the modules with which the second and every later stage begin."""
    owners: Mapping[str, int]
    """By name of a weight, the stages that use it, as bits."""

    def place(self, stage: int) -> None:
        """Keep the weights of `stage`, on the device; let go of the others."""
        tables = {id(table) for weight in self.cast.weights for table, _ in weight.places}
        for weight in self.cast.weights:
            kept = self.owners.get(weight.name, 0) >> stage & 1
            weight.tensor = _moved(weight.tensor, self.cast.device) if kept and weight.tensor is not None else None
            weight.put_back()
        for module in self.cast.model.modules():
            if id(module._buffers) not in tables:  # outside blocks: on every rank
                for key, buffer in module._buffers.items():
                    module._buffers[key] = None if buffer is None else buffer.to(self.cast.device)

    def stage_bytes(self, stage: int) -> int:
        """Bytes of the weights of a stage."""
        return sum(weight.size_bytes for weight in self.cast.weights if self.owners.get(weight.name, 0) >> stage & 1)


def divide(
    model: nn.Module,
    split_points: str | Sequence[str],
    classes: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None,
    example: Mapping[str, Any],
    *,
    num_stages: int,
    device: torch.device,
) -> Division:
    """Divide `model` over `num_stages`, by what it uses for `example` (``args`` and ``kwargs``). Exchanges nothing.

    Raises:
        ConfigError: for a model that cannot be divided so.
    """
    auto = isinstance(split_points, str)
    named = () if isinstance(split_points, str) else check_split_points(model, split_points, num_stages)
    cast = Cast(model, _units(model, named, classes), device=device)
    try:
        route = rehearse(cast, example["args"], example["kwargs"])
        sizes = _sizes(cast, route)
        if auto and not sizes:
            raise ConfigError(
                f"No blocks were found in `{type(model).__name__}` between which it could be cut: it has no list of "
                f"layers of one class that it calls. Name in `split_points` the {num_stages - 1} module(s) with which "
                f"later stages begin, or in `no_split_module_classes` the class of its blocks."
            )
        starts = _planned(cast, example, route, sizes, num_stages) if auto else _ordered(named, route)
        return Division(cast, starts, owners_of(route, starts))
    except BaseException:
        cast.dismiss()
        raise


def _units(
    model: nn.Module,
    named: tuple[str, ...],
    classes: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None,
) -> list[tuple[str, nn.Module]]:
    """Blocks, and the modules that were named; a block with one of these inside is none any more."""
    blocks = outermost(find_blocks(model, classes=classes))
    kept = [
        (name, block)
        for name, block in blocks
        if not any(name == each or name.startswith(f"{each}.") or each.startswith(f"{name}.") for each in named)
    ]
    return kept + [(name, model.get_submodule(name)) for name in named]


def _sizes(cast: Cast, route: Route) -> dict[str, int]:
    """Bytes by block, in the order in which they are computed.

    What is used before the first counts for the first, and what is used between two blocks for the one before it.
    """
    sizes = dict.fromkeys(route.calls, 0)
    if sizes:
        first = route.calls[0]
        for weight in cast.weights:
            for place in {place or first for place in route.uses.get(weight.name, ())}:
                sizes[place] += weight.size_bytes
    return sizes


def _planned(
    cast: Cast, example: Mapping[str, Any], route: Route, sizes: Mapping[str, int], num_stages: int
) -> tuple[str, ...]:
    """The best cuts; where the model cannot be cut there, the best of those places where it can.

    Cuts that can be made each for itself can be made together: what is needed after the second, and computed before
    the first, passes through the first as well, since it is needed after that.
    """
    starts = tuple(plan_split_points(sizes, num_stages))
    refusal = _refusal(cast, example, route, starts)
    if refusal is None:
        return starts
    groups: dict[str, int] = {}
    for name, size in sizes.items():
        if not groups or _refusal(cast, example, route, (name,)) is None:
            groups[name] = 0
        groups[next(reversed(groups))] += size
    if len(groups) < num_stages:
        raise ConfigError(
            f"{num_stages} pipeline stages were asked for, and of the {len(sizes)} blocks of "
            f"`{type(cast.model).__name__}` only {len(groups)} can begin one, the first included: {refusal} Start at "
            f"most {len(groups)} process(es)."
        ) from refusal
    return tuple(plan_split_points(groups, num_stages))


def _refusal(cast: Cast, example: Mapping[str, Any], route: Route, starts: tuple[str, ...]) -> ConfigError | None:
    """Why the model cannot be cut there, if it cannot."""
    try:
        rehearse(cast, example["args"], example["kwargs"], starts=starts, owners=owners_of(route, starts))
    except ConfigError as error:
        return error
    return None


def _ordered(named: tuple[str, ...], route: Route) -> tuple[str, ...]:
    for name in named:
        if name not in route.calls:
            raise ConfigError(
                f"`split_points` names {name!r}, which the model did not call with the example inputs, so no stage can "
                f"begin there. Name a module that it calls, such as a block and not the list that holds it."
            )
    return tuple(sorted(named, key=route.calls.index))


def owners_of(route: Route, starts: tuple[str, ...]) -> dict[str, int]:
    """By name of a weight, the stages that use it, as bits, if later stages begin with `starts`."""
    order = {name: index for index, name in reversed(list(enumerate(route.calls)))}
    begins = [order[name] for name in starts]

    def stage(place: str) -> int:
        return 0 if not place else sum(begin <= order[place] for begin in begins)

    owners: dict[str, int] = {}
    for name, places in route.uses.items():
        for place in places:
            owners[name] = owners.get(name, 0) | 1 << stage(place)
    return owners


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device == device:
        return tensor
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
