"""Follow a model's forward for its shapes alone, to learn which stage needs what.

The model's own Python code runs, with `Absent` weights: its blocks are not computed, only what shapes they give. That
tells the order of the blocks, the weights that each part of the model uses, what has to pass from a stage to the next,
and what the whole model returns, at any size of the inputs and without the values of any weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from accel_parallel.pipeline.absent import Absent
from accel_parallel.pipeline.cast import Cast, Unit
from accel_parallel.pipeline.microbatch import argument_name, named_tensors
from accel_parallel.pipeline.outline import outline
from accel_state.errors import ConfigError
from accel_state.tree import map_tensors

__all__ = ["Boundary", "Route", "rehearse"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """What passes from one stage to the next: tensors among the arguments of the next stage's first unit."""

    unit: str
    paths: tuple[str, ...]
    shapes: tuple[torch.Tensor, ...]
    """On the meta device, contiguous."""


@dataclass(frozen=True, slots=True)
class Route:
    """The way of a micro-batch of one shape through the model."""

    calls: tuple[str, ...]
    """Names of the units in the order in which they are called; a shared one several times."""
    stages: tuple[int, ...]
    """Stage of each call."""
    outputs: tuple[Any, ...]
    """What each call gives, with `Absent` tensors."""
    boundaries: tuple[Boundary, ...]
    """The k-th is between stages k and k + 1."""
    result: Any
    """What the model gives, with `Absent` tensors."""
    uses: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By name of a weight, after the begin of which units it is used; ``""``: before the first."""


@torch.no_grad()
def rehearse(
    cast: Cast,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    starts: Sequence[str] = (),
    owners: Mapping[str, int] | None = None,
) -> Route:
    """Run the model's forward for its shapes.

    Args:
        cast: the model.
        args: positional inputs of one micro-batch, on the device.
        kwargs: inputs by name.
        starts: names of the units with which the second and every later stage begin.
        owners: which stages have each weight, as bits; by default all have all.

    Raises:
        ConfigError: if a stage would need what it cannot have.
    """
    names = [weight.name for weight in cast.weights]
    scene = _Scene(cast, tuple(starts), owners or dict.fromkeys(names, -1))
    cast.journal.begin()
    cast.journal.rehearsing = True
    try:
        with cast.without_values(scene.owners), cast.played_by(scene.play):
            result = cast.model(*args, **kwargs)
    finally:
        cast.journal.rehearsing = False
    return scene.route(result)


class _Scene:
    """One rehearsal."""

    def __init__(self, cast: Cast, starts: tuple[str, ...], owners: Mapping[str, int]) -> None:
        self.cast, self.starts, self.owners = cast, starts, owners
        self.calls: list[str] = []
        self.stages: list[int] = []
        self.outputs: list[Any] = []
        self.boundaries: list[Boundary] = []

    def play(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        journal = self.cast.journal
        first = unit.name not in self.calls
        given = named_tensors({"args": args, "kwargs": kwargs})
        if first:
            if unit.name in self.starts:
                self.boundaries.append(self._cross(unit, given))
            journal.place = unit.name
        for path, tensor in given:
            if isinstance(tensor, Absent) and tensor.label:
                journal.uses.setdefault(tensor.label, set()).add(journal.place)
            self._check_there(tensor, f"argument `{argument_name(path)}` of `{unit.name}`")
        for weight in unit.weights:
            journal.uses.setdefault(weight.name, set()).add(journal.place)
            if not self.owners.get(weight.name, 0) >> journal.stage & 1:
                raise _not_in_example(weight.name)
        with self.cast.played_by(None):
            outlined = outline(unit, self.cast, args, kwargs)
        outputs = outlined.outputs
        self._check_writes(unit, dict(given), outlined.written)
        self.calls.append(unit.name)
        self.stages.append(journal.stage)
        self.outputs.append(outputs)
        return map_tensors(outputs, self._give)

    def _check_writes(self, unit: Unit, given: Mapping[str, torch.Tensor], written: Sequence[str]) -> None:
        """A later stage passes over the unit, so what it has already must not change here."""
        for path in written:
            tensor = given[path]
            if not isinstance(tensor, Absent) or tensor.stages >> self.cast.journal.stage + 1:
                raise ConfigError(
                    f"`{unit.name}` writes in place into its argument `{argument_name(path)}` of shape "
                    f"{tuple(tensor.shape)}, which later stages have already, so they would go on with its old "
                    f"content. Let it return a new tensor, or begin the stages elsewhere with `split_points`."
                )

    def _give(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Absent):
            return tensor
        given = tensor.fresh()
        given.stages = 1 << self.cast.journal.stage
        return given

    def _cross(self, unit: Unit, given: list[tuple[str, torch.Tensor]]) -> Boundary:
        """The next stage begins: let it have what it lacks of the arguments."""
        journal = self.cast.journal
        old, new = journal.stage, journal.stage + 1
        paths, shapes = [], []
        for path, tensor in given:
            if not isinstance(tensor, Absent) or tensor.stages >> new & 1:
                continue
            if not tensor.stages >> old & 1:
                raise _skips(f"argument `{argument_name(path)}` of `{unit.name}`", tensor, old)
            tensor.stages |= 1 << new  # the very object, wherever else the model's code holds it
            paths.append(path)
            shapes.append(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        if not paths:
            raise ConfigError(
                f"A stage was to begin with `{unit.name}`, and nothing that was computed before goes into it, so the "
                f"stage before would do nothing for it. Begin the stage at a later module, with `split_points`."
            )
        journal.stage = new
        return Boundary(unit.name, tuple(paths), tuple(shapes))

    def _check_there(self, tensor: torch.Tensor, what: str) -> None:
        stage = self.cast.journal.stage
        if isinstance(tensor, Absent) and not tensor.stages >> stage & 1:
            if tensor.label and not self.owners.get(tensor.label, 0):
                raise _not_in_example(tensor.label)
            raise _skips(what, tensor, stage)

    def route(self, result: Any) -> Route:
        missed = [name for name in self.starts if name not in self.calls]
        if missed:
            raise ConfigError(
                f"A stage was to begin with `{missed[0]}`, and the model did not call it with these inputs. Name in "
                f"`split_points` modules that are called, and give the inputs that the model needs to call them."
            )
        for path, tensor in named_tensors(result):
            self._check_there(tensor, f"the output at `{path or 'the top'}`")
        uses = {name: frozenset(places) for name, places in self.cast.journal.uses.items()}
        return Route(tuple(self.calls), tuple(self.stages), tuple(self.outputs), tuple(self.boundaries), result, uses)


def _skips(what: str, tensor: torch.Tensor, stage: int) -> ConfigError:
    return ConfigError(
        f"Stage {stage} needs {what}, a tensor of shape {tuple(tensor.shape)}, which an earlier stage computes and "
        f"which is no argument of the first block of each stage between: a connection that skips stages. Begin the "
        f"stages elsewhere with `split_points`, so that it stays within one stage, or use fewer processes."
    )


def _not_in_example(name: str) -> ConfigError:
    return ConfigError(
        f"The model uses `{name}` with these inputs, and it did not with the example's, so that no stage holds it. "
        f"Give `prepare_pippy` an example with the same kinds of inputs as the calls have."
    )
