"""Devices as a table: one row a device type, no branch on it anywhere else.

A row names what differs between device types. Everything that ``torch.accelerator`` or the module
``torch.<type>`` does alike for all of them is asked there.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError, MissingDependencyError

__all__ = ["DEVICES", "DeviceKind", "available_kind", "device_kind", "select_device"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceKind:
    """One type of device."""

    type: str
    """Name that ``torch.device`` knows."""
    label: str
    """Ending of the distributed type that users know, as in ``MULTI_GPU``."""
    backend: str
    """``torch.distributed`` backend, the one for CPU tensors included."""
    precisions: frozenset[str]
    """Settings of ``mixed_precision`` in which the device computes natively or by emulation in torch."""
    plugin: str | None = None
    """Module that teaches torch this device, where torch itself does not."""
    distribution: str | None = None
    """What to install to have `plugin`, where that is named otherwise."""
    seed_function: str = "manual_seed_all"
    """Function of `module` that seeds the device's generators."""
    indexed: bool = True
    """Whether a node may hold several, so that each process takes the one of its local rank."""

    @property
    def module(self) -> ModuleType | None:
        """Module with the RNG and memory functions, ``torch.<type>``; ``None`` where there is none, as for the CPU."""
        if self.type == "cpu":
            return None
        if self.type == "xla":
            return importlib.import_module("torch_xla.core.xla_model") if _installed("torch_xla") else None
        module: ModuleType | None = getattr(torch, self.type, None)
        return module

    def is_available(self) -> bool:
        """Whether this process can use such a device now."""
        if self.type == "cpu":
            return True
        if self.plugin is not None:
            if not _installed(self.plugin):
                return False
            importlib.import_module(self.plugin)
        if self.type == "xla":
            return True
        if self.type == "mps":
            return torch.backends.mps.is_available()
        return self.call("is_available", default=False) is True

    def count(self) -> int:
        """Devices of this type that this process sees."""
        if not self.is_available():
            return 0
        return int(self.call("device_count", default=1)) if self.indexed else 1

    def call(self, function: str, *args: Any, default: Any = None) -> Any:
        """Call a function of ``torch.<type>``, or give `default` where this device type has none of that name."""
        found = getattr(self.module, function, None)
        return default if found is None else found(*args)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


_ALL = frozenset({"no", "fp16", "bf16"})
_BF16 = frozenset({"no", "bf16"})

DEVICES: dict[str, DeviceKind] = {
    kind.type: kind
    for kind in (
        DeviceKind(type="cuda", label="GPU", backend="cpu:gloo,cuda:nccl", precisions=_ALL),
        DeviceKind(type="xpu", label="XPU", backend="cpu:gloo,xpu:xccl", precisions=_ALL),
        DeviceKind(
            type="mps", label="MPS", backend="gloo", precisions=_ALL, indexed=False, seed_function="manual_seed"
        ),
        DeviceKind(type="npu", label="NPU", backend="cpu:gloo,npu:hccl", precisions=_ALL, plugin="torch_npu"),
        DeviceKind(
            type="hpu",
            label="HPU",
            backend="cpu:gloo,hpu:hccl",
            precisions=_BF16,
            plugin="habana_frameworks.torch",
            distribution="habana-torch-plugin",
        ),
        DeviceKind(type="mlu", label="MLU", backend="cpu:gloo,mlu:cncl", precisions=_ALL, plugin="torch_mlu"),
        DeviceKind(type="musa", label="MUSA", backend="cpu:gloo,musa:mccl", precisions=_ALL, plugin="torch_musa"),
        DeviceKind(type="sdaa", label="SDAA", backend="cpu:gloo,sdaa:tccl", precisions=_ALL, plugin="torch_sdaa"),
        DeviceKind(
            type="neuron", label="NEURON", backend="cpu:gloo,neuron:neuron", precisions=_BF16, plugin="torch_neuronx"
        ),
        DeviceKind(
            type="xla",
            label="XLA",
            backend="xla",
            precisions=_BF16,
            plugin="torch_xla",
            seed_function="set_rng_state",
        ),
        DeviceKind(type="cpu", label="CPU", backend="gloo", precisions=_ALL, indexed=False),
    )
}
"""Every device type, in the order in which one is chosen when none is asked for."""


def device_kind(name: str) -> DeviceKind:
    """The row of a device type.

    Raises:
        ConfigError: if there is no such row.
    """
    if name not in DEVICES:
        raise ConfigError(
            f"`device={name!r}` is not a device type known here.{did_you_mean(name, list(DEVICES))} "
            f"Use one of {', '.join(DEVICES)}."
        )
    return DEVICES[name]


def available_kind() -> DeviceKind:
    """The first row whose device can be used here; the CPU at the latest."""
    return next(kind for kind in DEVICES.values() if kind.is_available())


def select_device(
    name: str | None, *, local_rank: int = 0, local_world_size: int = 1
) -> tuple[DeviceKind, torch.device]:
    """The device of this process, and its row.

    Args:
        name: device type, or ``None`` for the machine's accelerator, else the CPU.
        local_rank: number of this process on its node; it takes the device of that index.
        local_world_size: processes of this node, all of which need a device.

    Raises:
        ConfigError: if the device is unknown or absent, or there are more processes than devices.
        MissingDependencyError: if the device needs a package that is not installed.
    """
    kind = available_kind() if name is None else device_kind(name)
    if not kind.is_available():
        if kind.plugin is not None and not _installed(kind.plugin):
            raise MissingDependencyError(kind.distribution or kind.plugin, purpose=f"`device={name!r}`")
        raise ConfigError(
            f"`device={name!r}` was asked for, but torch {torch.__version__} sees no such device in this process. "
            f"Check the driver and the installed torch, or use `device={available_kind().type!r}`, which is here."
        )
    if not kind.indexed or kind.type == "xla":
        return kind, torch.device(kind.type)
    if local_world_size > kind.count():
        raise ConfigError(
            f"{local_world_size} processes were launched on this node, but it has {kind.count()} `{kind.type}` "
            f"device(s), and each process needs its own. Launch at most {kind.count()}, or use `--cpu`."
        )
    return kind, torch.device(kind.type, local_rank)
