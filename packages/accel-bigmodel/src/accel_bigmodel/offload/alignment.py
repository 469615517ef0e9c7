"""Inputs brought to where a module computes, and outputs to where the inputs were."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from accel_state.tree import find_device, send_to_device

__all__ = ["align", "unalign"]


class _ToDevice:
    """Before a forward: its inputs go to the device of the module."""

    def __init__(self, device: torch.device, skip_keys: Collection[str]) -> None:
        self.device = device
        self.skip_keys = skip_keys

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (
            send_to_device(args, self.device, skip_keys=self.skip_keys),
            send_to_device(kwargs, self.device, skip_keys=self.skip_keys),
        )


class _Remember:
    """Before the forward of the whole model: where its inputs are. Behind it, its outputs go there."""

    def __init__(self, skip_keys: Collection[str]) -> None:
        self.skip_keys = skip_keys
        self.devices: list[torch.device | None] = []

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.devices.append(find_device((args, kwargs)))


class _Return:
    def __init__(self, remembered: _Remember) -> None:
        self.remembered = remembered

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        device = self.remembered.devices.pop() if self.remembered.devices else None
        return output if device is None else send_to_device(output, device, skip_keys=self.remembered.skip_keys)


def align(model: nn.Module, devices: Mapping[str, torch.device], *, skip_keys: Collection[str] | str = ()) -> None:
    """Have inputs go where each of the named modules computes, and outputs of the whole come back.

    Args:
        model: the whole.
        devices: where modules compute; ``""`` is the whole model.
        skip_keys: keyword arguments, and entries of mappings at any depth, that stay where they are.
    """
    skip = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
    remember = _Remember(skip)
    model.register_forward_pre_hook(remember, with_kwargs=True, prepend=True)
    for name, device in devices.items():
        model.get_submodule(name).register_forward_pre_hook(_ToDevice(device, skip), with_kwargs=True)
    model.register_forward_hook(_Return(remember), always_call=True)


def unalign(model: nn.Module) -> None:
    """Undo `align`."""
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                if isinstance(hook, (_ToDevice, _Remember, _Return)):
                    del table[key]
                    for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs,
                                  module._forward_hooks_always_called):  # fmt: skip
                        flags.pop(key, None)
