"""Whole models that take turns on a device, as the parts of a pipeline do."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import nn

from accel_bigmodel.offload.alignment import align, unalign
from accel_bigmodel.offload.division import Group, group_tensors
from accel_bigmodel.offload.hooks import detach, refuse_offloaded
from accel_bigmodel.offload.offloading import place_on_device, resolve_device
from accel_bigmodel.offload.streaming import make_unit
from accel_bigmodel.offload.unit import Unit
from accel_bigmodel.stream import AcceleratorTransfers, Engine, HostMemory, Transfers

__all__ = ["UserCpuOffloadHook", "cpu_offload_with_hook"]


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: torch.device | str | int | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Bring all of `model` to the device at its forward, and leave it there until somebody needs the room.

    For models that run one behind the other, several times each, such as the parts of a diffusion pipeline: moving a
    whole model once is less work than moving blocks at every forward. It leaves the device when its `hook.offload()` is
    called, or when the forward of a model begins that was given this hook as `prev_module_hook`.

    Args:
        model: changed in place.
        execution_device: where its forward runs; by default the accelerator of this process. On the CPU nothing moves.
        prev_module_hook: of the model that runs before this one, and makes room for it.

    Returns:
        The model, and the hook that moves it.
    """
    device = resolve_device(execution_device)
    transfers = None if device.type == "cpu" else AcceleratorTransfers(device)
    return model, hand_over(model, device, transfers, prev_module_hook)


def hand_over(
    model: nn.Module, device: torch.device, transfers: Transfers | None, before: UserCpuOffloadHook | None
) -> UserCpuOffloadHook:
    """The same, on a device that is given; None is one where nothing has to move."""
    refuse_offloaded(model)
    hook = UserCpuOffloadHook(model, None)
    if transfers is not None:
        tensors = group_tensors(model)
        moved = [each for each in tensors if each.places[0].is_parameter]
        place_on_device([each for each in tensors if not each.places[0].is_parameter], {}, device)
        engine = Engine(transfers, num_slots=1)
        group = Group(type(model).__name__, [], moved)
        unit = make_unit(group, {}, engine, HostMemory(transfers), is_stored=False)
        hook = UserCpuOffloadHook(model, unit)
        align(model, {"": device})
    model.register_forward_pre_hook(_Come(hook, before), prepend=True)
    return hook


class UserCpuOffloadHook:
    """Moves one model to its device and back to the host. Made by `cpu_offload_with_hook`."""

    def __init__(self, model: nn.Module, unit: Unit | None) -> None:
        self._model = weakref.ref(model)
        self._unit = unit
        self._is_there = False
        self._with_grad = False

    def come(self) -> None:
        """Bring the model to its device, if it is not there. Its forward calls this."""
        if self._unit is None:
            return
        if not self._is_there:
            self._unit.enter(one_forward=False)
            self._is_there = True
        elif self._with_grad != torch.is_grad_enabled():
            self._unit.put_again()
        self._with_grad = torch.is_grad_enabled()

    def offload(self) -> None:
        """Let the model leave the device. What was changed in place meanwhile is kept, unless through ``.data``."""
        if self._unit is not None and self._is_there:
            self._is_there = False
            self._unit.leave()
            self._unit.drop()

    def remove(self) -> None:
        """Take the hook away. The model is on the host afterwards, and an ordinary one."""
        self.offload()
        model = self._model()
        if model is None:
            return
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, _Come) and hook.hook is self:
                del model._forward_pre_hooks[key]
        if self._unit is not None:
            self._unit.put_for_good()
            detach(self._unit)
            unalign(model)
            self._unit = None

    def __deepcopy__(self, memo: dict[int, Any]) -> UserCpuOffloadHook:
        self.offload()
        made = UserCpuOffloadHook(copy.deepcopy(self._model(), memo), copy.deepcopy(self._unit, memo))  # type: ignore[arg-type]
        memo[id(self)] = made
        return made


class _Come:
    def __init__(self, hook: UserCpuOffloadHook, before: UserCpuOffloadHook | None) -> None:
        self.hook = hook
        self.before = before

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.before is not None:
            self.before.offload()
        self.hook.come()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Come:
        """What runs before the copy is what runs before this."""
        return _Come(copy.deepcopy(self.hook, memo), self.before)
