"""Giving one instance a forward of its own, so that its name, class, state and hooks stay as they are.

The new forward is a bound method that finds everything through its ``self``: a deep copy runs the copy, and a pickled
module comes back with the forward of its class. Hooks of the module, such as those of FSDP2, run outside of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from accel_state.errors import ConfigError

__all__ = ["Forward", "dress", "forward_of", "is_replaced", "replace_forward", "restore_forward"]

Forward = Callable[..., Any]
"""A forward that is not bound: the module is its first argument."""

_MARK = "accel_layer"


@dataclass(frozen=True, slots=True)
class _Layer:
    kind: str
    function: Forward
    inner: Forward


def forward_of(module: nn.Module) -> Forward:
    """What ``module(...)`` runs inside its hooks, unbound. Modules that run the same give the same function."""
    own = module.__dict__.get("forward")
    if own is None:
        return type(module).forward
    if isinstance(own, MethodType) and own.__self__ is module:
        return own.__func__

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)  # bound by whoever put it there

    dress(forward, own)
    return forward


def dress(outer: Forward, inner: Forward) -> None:
    """Let `outer` look like `inner`, signature and marks of others included, without being taken for it by dynamo."""
    vars(outer).update({name: value for name, value in vars(inner).items() if not name.startswith("_torchdynamo")})
    functools.update_wrapper(outer, inner, updated=())


def replace_forward(module: nn.Module, kind: str, outer: Forward, inner: Forward) -> None:
    """Let ``module(...)`` run ``outer(module, ...)``, made from `inner`, its `forward_of`, and dressed as that."""
    setattr(outer, _MARK, _Layer(kind, outer, inner))
    module.__dict__["forward"] = MethodType(outer, module)


def is_replaced(module: nn.Module, kind: str) -> bool:
    """Whether a forward of this kind is in place, be it below others."""
    return any(layer.kind == kind for layer in _layers(forward_of(module)))


def restore_forward(module: nn.Module, kind: str, *, how: str) -> None:
    """Undo the last `replace_forward`, of this kind; nothing where there was none.

    Raises:
        ConfigError: if it lies below another one, or below what somebody else put there. `how` says what undoes it.
    """
    if not is_replaced(module, kind):
        return
    current = forward_of(module)
    layer: _Layer = getattr(current, _MARK)
    if layer.function is not current or layer.kind != kind:
        raise ConfigError(
            f"{how} would give a `{type(module).__name__}` back the forward that it had, but its forward was replaced "
            f"again since then. Undo in the opposite order: what came last first."
        )
    if layer.inner is type(module).forward:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = MethodType(layer.inner, module)


def _layers(function: Forward) -> Iterator[_Layer]:
    while (layer := getattr(function, _MARK, None)) is not None:
        yield layer
        function = layer.inner
