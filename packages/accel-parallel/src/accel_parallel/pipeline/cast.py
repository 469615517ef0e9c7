"""The parts of a model that is divided into stages: units, weights, and who computes what units give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from accel_parallel.pipeline.absent import Absent, Journal

__all__ = ["Cast", "Unit", "Weight"]


@dataclass(slots=True)
class Weight:
    """A parameter, or a buffer of a unit, at all places where the model has it."""

    name: str
    places: list[tuple[dict[str, Any], str]]
    """The tables of modules that hold it, and the key in each."""
    absent: Absent
    tensor: torch.Tensor | None
    """The values, where this rank has them."""
    size_bytes: int
    units: set[str]
    """Names of the units that hold it."""

    def put(self, tensor: torch.Tensor) -> None:
        """Let the model have `tensor` in its place."""
        for table, key in self.places:
            table[key] = tensor

    def put_back(self) -> None:
        """Let the model have what there is: the values, or what stands for them."""
        self.put(self.absent if self.tensor is None else self.tensor)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the model that one stage computes in one go."""

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    """What it computes; the module's own ``forward`` asks the one who plays first."""
    weights: list[Weight]


class Cast:
    """A model's units and weights, and who plays them.

    While it exists, calls of units go to `player`, and without one to the units themselves.
    """

    def __init__(self, model: nn.Module, units: Iterable[tuple[str, nn.Module]], *, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.journal = Journal()
        self.player: Callable[[Unit, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self.rules: dict[str, Any] = {}
        """By name of a unit, how what it gives is shaped, where that cannot be followed."""
        self.units: dict[str, Unit] = {}
        for name, module in units:
            unit = self.units[name] = Unit(name, module, module.forward, [])
            module.forward = partial(self._call, unit)
        self.weights = _weights(model, self.units.values(), device, self.journal)
        for weight in self.weights:
            for name in weight.units:
                self.units[name].weights.append(weight)

    def _call(self, unit: Unit, *args: Any, **kwargs: Any) -> Any:
        if self.player is None:
            return unit.forward(*args, **kwargs)
        return self.player(unit, args, kwargs)

    def dismiss(self) -> None:
        """Let the model compute its units itself again."""
        for unit in self.units.values():
            unit.module.__dict__.pop("forward", None)

    @contextmanager
    def played_by(self, player: Callable[[Unit, tuple[Any, ...], dict[str, Any]], Any] | None) -> Iterator[None]:
        """While open, `player` computes what units give."""
        before, self.player = self.player, player
        try:
            yield
        finally:
            self.player = before

    @contextmanager
    def without_values(self, owners: Mapping[str, int]) -> Iterator[None]:
        """While open, all weights are absent; bit *k* of ``owners[name]`` says that stage *k* will have it."""
        for weight in self.weights:
            weight.absent.stages = owners.get(weight.name, 0)
            weight.put(weight.absent)
        try:
            yield
        finally:
            for weight in self.weights:
                weight.put_back()


def _weights(model: nn.Module, units: Iterable[Unit], device: torch.device, journal: Journal) -> list[Weight]:
    """All parameters, and the buffers of units. Other buffers stay as they are, on every rank: they are small."""
    home: dict[nn.Module, set[str]] = {}
    for unit in units:
        for module in unit.module.modules():
            home.setdefault(module, set()).add(unit.name)
    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules():
        tables = [module._parameters, module._buffers] if module in home else [module._parameters]
        for table in tables:
            for key, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in found:
                    name = f"{prefix}.{key}" if prefix else key
                    absent = Absent.weight(tensor, name=name, device=device, journal=journal)
                    found[id(tensor)] = Weight(name, [], absent, tensor, tensor.nbytes, set())
                weight = found[id(tensor)]
                weight.places.append((table, key))
                weight.units |= home.get(module, set())
    return list(found.values())
