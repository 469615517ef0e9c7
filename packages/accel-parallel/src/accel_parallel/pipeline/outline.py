"""What shapes a block gives, without computing it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from accel_parallel.pipeline.absent import Absent, shadow_of
from accel_parallel.pipeline.cast import Cast, Unit
from accel_parallel.pipeline.microbatch import named_tensors
from accel_state.errors import ConfigError
from accel_state.tree import map_tensors

__all__ = ["Like", "Outline", "outline"]


@dataclass(frozen=True, slots=True)
class Outline:
    """What calling a block comes to, but for values."""

    outputs: Any
    """With `Absent` tensors, or with `Like` where it holds for any sizes."""
    written: tuple[str, ...]
    """Paths of arguments that it changes in place."""


class Like:
    """In place of a tensor that a block gives: it is shaped as the argument at `path`."""

    __slots__ = ("path",)  # no dataclass, which would be a container of tensors

    def __init__(self, path: str) -> None:
        self.path = path


def outline(unit: Unit, cast: Cast, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outline:
    """What `unit` gives for `args` and `kwargs`, with `Absent` tensors.

    Its code runs on tensors without values. A block that cannot, since it decides by values (experts to which tokens
    are sent) or calls a kernel that knows no such tensors, is computed once, while its weights are still here: each
    tensor that it gave is taken to be shaped as the argument of the same shape, whatever the sizes later. The stage
    that has the block checks that.

    Raises:
        ConfigError: for such a block if no argument has the shape of what it gave.
    """
    rule = cast.rules.get(unit.name)
    if rule is None:
        try:
            return _followed(unit, cast, args, kwargs)
        except (RuntimeError, NotImplementedError):
            if any(weight.tensor is None for weight in unit.weights):
                raise
        rule = cast.rules[unit.name] = _learned(unit, cast, args, kwargs)
    return _applied(rule, args, kwargs, cast)


def _followed(unit: Unit, cast: Cast, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outline:
    from torch._subclasses.fake_tensor import FakeTensorMode  # only where a pipeline is made: it is slow to import

    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=cast.device)

        for weight in unit.weights:
            weight.put(fake(weight.absent))
        try:
            outputs, written = _called(unit, {"args": args, "kwargs": dict(kwargs)}, fake)
        finally:
            for weight in unit.weights:
                weight.put(weight.absent)
    absent = map_tensors(outputs, lambda each: Absent(shadow_of(each), device=each.device, journal=cast.journal))
    return Outline(absent, written)


def _called(unit: Unit, given: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, tuple[str, ...]]:
    """What `unit` gives for arguments replaced by `fn`, and the paths of those that it wrote to."""
    copies = map_tensors(given, fn)
    before = [(path, copy, copy._version) for path, copy in named_tensors(copies)]
    outputs = unit.forward(*copies["args"], **copies["kwargs"])
    return outputs, tuple(path for path, copy, version in before if copy._version != version)


def _learned(unit: Unit, cast: Cast, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outline:
    """What `unit` gives, with a `Like` in place of each tensor."""
    here = next((weight.tensor.device for weight in unit.weights if weight.tensor is not None), cast.device)

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Absent):
            return tensor.to(here, copy=True)
        made = torch.zeros(tensor.shape, dtype=tensor.dtype, device=here)
        return made.uniform_(-1, 1, generator=generator) if made.is_floating_point() else made

    generator = torch.Generator(here).manual_seed(0)
    for weight in unit.weights:
        weight.put_back()
    try:
        outputs, written = _called(unit, {"args": args, "kwargs": dict(kwargs)}, real)
    finally:
        for weight in unit.weights:
            weight.put(weight.absent)
    given = named_tensors({"args": args, "kwargs": kwargs})

    def like(tensor: torch.Tensor) -> Like:
        for path, argument in given:
            if argument.shape == tensor.shape and argument.dtype == tensor.dtype:
                return Like(path)
        raise ConfigError(
            f"`{unit.name}` decides by values, so the shapes that it gives cannot be followed, and it gave "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}, which none of its arguments has, so they cannot be "
            f"guessed. Name in `no_split_module_classes` the class of a larger module, which gives a tensor shaped as "
            f"one that it takes."
        )

    return Outline(map_tensors(outputs, like), written)


def _applied(rule: Outline, args: tuple[Any, ...], kwargs: Mapping[str, Any], cast: Cast) -> Outline:
    given = dict(named_tensors({"args": args, "kwargs": kwargs}))

    def shaped(leaf: Any, _path: str) -> Any:
        if not isinstance(leaf, Like):
            return leaf
        return Absent(shadow_of(given[leaf.path]), device=cast.device, journal=cast.journal)

    return Outline(map_tensors(rule.outputs, lambda tensor: tensor, on_other=shaped), rule.written)


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, torch does not log what it could not follow: it is raised, and there is another way."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
