"""What a module calls for its units: before its forward, behind it, and when its state is read or loaded."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from accel_bigmodel.offload.placeholder import Placeholder, pickling_refused
from accel_bigmodel.offload.saved import current_hooks
from accel_bigmodel.offload.unit import Unit
from accel_state.errors import ConfigError

__all__ = ["attach", "detach", "refuse_offloaded", "units_of"]


class _Hook:
    """Of one unit. A deep copy of the model has units of its own; a pickle of it cannot be made."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        made = type(self)(copy.deepcopy(self.unit, memo))
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickling_refused(self.unit.name)


def _uncompiled(function: Callable[..., None], *args: Any) -> None:
    """Call `function` where no compiler looks at it.

    ``torch.compiler.disable`` imports the compiler, which takes longer than torch itself. Where nobody has imported it,
    nothing is compiled.
    """
    if "torch._dynamo" in sys.modules:
        _disabled(function, *args)
    else:
        function(*args)


@_disable_dynamo
def _disabled(function: Callable[..., None], *args: Any) -> None:
    function(*args)


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        _uncompiled(self._enter, module)

    def _enter(self, module: nn.Module) -> None:
        if self.unit.was_entered_by(module) and not _is_inside(module):
            self.unit.reset()  # torch calls nothing behind a forward that Ctrl-C ended
        self.unit.enter(by=module)


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        _uncompiled(self.unit.leave)


class _EnterInside(_Hook):
    """Of a module inside a block, which may be called without it, as by activation checkpointing inside the block.

    Where the block was entered this is a comparison, and no reason to end a graph.
    """

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self.unit.is_entered:
            _uncompiled(self._enter, module)

    def _enter(self, module: nn.Module) -> None:
        # Checkpointing inside the block was the innermost to look at what its forward saved, and counts again what the
        # second one saves. That is used at once, so it may keep the weights.
        self.unit.enter(one_forward=current_hooks() is None)
        self.unit.opener = weakref.ref(module)


class _LeaveInside(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.unit.opener is not None:
            _uncompiled(self._leave, module)

    def _leave(self, module: nn.Module) -> None:
        if self.unit.opener is not None and self.unit.opener() is module:
            self.unit.opener = None
            self.unit.leave()


class _FillState(_Hook):
    """Gives ``state_dict`` the values instead of the placeholders."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        values = None
        for position, tensor in enumerate(self.unit.tensors):
            for place in tensor.places:
                key = prefix + place.name
                if place.module() is module and isinstance(state.get(key), Placeholder):
                    values = self.unit.values() if values is None else values
                    kept = state[key]  # with `keep_vars`, a parameter
                    value = values[position]
                    state[key] = nn.Parameter(value, kept.requires_grad) if isinstance(kept, nn.Parameter) else value


class _TakeState(_Hook):
    """Takes values from a state that is loaded, before the module would copy them into placeholders for nothing."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for position, tensor in enumerate(self.unit.tensors):
            for place in tensor.places:
                value = state.get(prefix + place.name)
                if place.module() is not module or not isinstance(value, torch.Tensor) or value.device.type == "meta":
                    continue
                if value.shape != tensor.placeholder.shape:
                    continue  # refused by the module itself
                with torch.no_grad():
                    self.unit.set_value(position, value)
                state[prefix + place.name] = place.get()  # the module copies it onto itself, or assigns it to itself


def _is_inside(module: nn.Module) -> bool:
    """Whether a forward of `module` runs within another one of it, rather than being the only one."""
    frame, count = sys._getframe(), 0
    while frame is not None and count < 2:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count == 2


def attach(unit: Unit, modules: list[nn.Module]) -> None:
    """Have the forwards of `modules` enter and leave `unit`, and the state of its modules know of it.

    Modules inside of these that hold its tensors enter it too, where they are called by themselves.
    """
    for module in modules:
        module.register_forward_pre_hook(_Enter(unit), prepend=True)
        module.register_forward_hook(_Leave(unit), always_call=True)
    unit.hooked = [weakref.ref(module) for module in modules]
    owners = {id(place.module()): place.module() for tensor in unit.tensors for place in tensor.places}
    for owner in owners.values():
        assert owner is not None
        unit.hooked.append(weakref.ref(owner))
        if owner not in modules:
            owner.register_forward_pre_hook(_EnterInside(unit), prepend=True)
            owner.register_forward_hook(_LeaveInside(unit), always_call=True)
        owner.register_state_dict_post_hook(_FillState(unit))  # type: ignore[no-untyped-call]
        owner.register_load_state_dict_pre_hook(_TakeState(unit))  # type: ignore[no-untyped-call]
    for tensor in unit.tensors:
        for place in tensor.places:
            place.put(tensor.placeholder)


def _hook_tables(module: nn.Module) -> Iterator[dict[int, Any]]:
    yield module._forward_pre_hooks
    yield module._forward_hooks
    yield module._state_dict_hooks
    yield module._load_state_dict_pre_hooks


def _ours(hook: Any) -> _Hook | None:
    inner = getattr(hook, "hook", hook)  # torch wraps some
    return inner if isinstance(inner, _Hook) else None


def units_of(module: nn.Module, *, recurse: bool = True) -> list[Unit]:
    """Units that `module` holds tensors of, or enters; with `recurse`, those of its submodules too. Each once."""
    found: dict[int, Unit] = {}
    for each in module.modules() if recurse else [module]:
        for table in _hook_tables(each):
            for hook in table.values():
                ours = _ours(hook)
                if ours is not None:
                    found[id(ours.unit)] = ours.unit
    return list(found.values())


def detach(unit: Unit) -> None:
    """Remove the hooks of `unit`, from all modules that have some."""
    for each in [module for ref in unit.hooked if (module := ref()) is not None]:
        for table in _hook_tables(each):
            for key, hook in list(table.items()):
                ours = _ours(hook)
                if ours is not None and ours.unit is unit:
                    del table[key]
                    for flags in (each._forward_pre_hooks_with_kwargs, each._forward_hooks_with_kwargs,
                                  each._forward_hooks_always_called):  # fmt: skip
                        flags.pop(key, None)


def refuse_offloaded(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: if weights of `model` are offloaded already.
    """
    units = units_of(model)
    if units:
        raise ConfigError(
            f"`{type(model).__name__}` has weights that are offloaded already ({units[0].name!r} is one of its parts). "
            f"Call `remove_hooks` first."
        )
