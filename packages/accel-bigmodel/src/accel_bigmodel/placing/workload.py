"""What a plan is for, and the machine it is for: sizes of the input, and speeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from accel_bigmodel.placing.memory import place_key
from accel_state.dtypes import dtype_size_bytes, parse_dtype
from accel_state.errors import ConfigError

__all__ = ["DeviceSpeed", "Machine", "Phase", "Workload"]

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The forward pass that memory and time are planned for."""

    batch_size: int = 1
    """Sequences at once."""
    sequence_length: int = 2048
    """Tokens of each: of the input, and what the KV cache holds."""
    phase: Phase = "prefill"
    """``prefill`` computes all tokens at once, ``decode`` one more token of each sequence from the cache."""
    kv_cache: bool = True
    """Whether keys and values are kept. Counted where the model has a configuration that tells their size."""
    dtype: torch.dtype | str | None = None
    """Of activations and of the KV cache; by default that of the weights."""
    activation_bytes: int | None = None
    """Peak of activations on a device, where it was measured. By default it is estimated from the shapes of weights."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"`{name}={value!r}` is no count that a forward could have. Give a positive integer.")
        if self.phase not in get_args(Phase):
            raise ConfigError(f"`phase={self.phase!r}` is no part of generation. Use 'prefill' or 'decode'.")
        if self.dtype is not None and not parse_dtype(self.dtype).is_floating_point:
            raise ConfigError(f"`dtype={self.dtype!r}` is no floating-point dtype, and activations have those.")
        value = self.activation_bytes
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ConfigError(f"`activation_bytes={value!r}` is no number of bytes. Give an integer, or `None`.")

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward computes."""
        return self.batch_size * (self.sequence_length if self.phase == "prefill" else 1)

    def element_bytes(self, default: torch.dtype) -> float:
        """Bytes of one activation, where weights are of dtype `default`."""
        return dtype_size_bytes(default if self.dtype is None else parse_dtype(self.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpeed:
    """How fast a device computes: the two roofs of the roofline model (Williams et al., CACM 52(4), 2009)."""

    tflops: float
    """10^12 floating-point operations a second that matrix products reach, in the dtype of the weights."""
    memory_gb_s: float
    """10^9 bytes a second that it reads from its own memory."""

    def __post_init__(self) -> None:
        _check_positive(self, "tflops", "memory_gb_s")

    def seconds(self, *, operations: float, read_bytes: float) -> float:
        """The later of computing and reading."""
        return max(operations / (self.tflops * 1e12), read_bytes / (self.memory_gb_s * 1e9))


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Speeds that times are predicted from. The defaults are assumptions about a server of today, not measurements of
    this one: give what yours reaches."""

    bus_gb_s: float = 50.0
    """10^9 bytes a second from pinned host memory to an accelerator; the default is about a PCIe 5.0 x16 link."""
    disk_gb_s: float = 5.0
    """10^9 bytes a second read from the disk; the default is one NVMe drive on PCIe 4.0."""
    peer_gb_s: float = 50.0
    """10^9 bytes a second from one accelerator to another."""
    accelerator: DeviceSpeed = field(default_factory=lambda: DeviceSpeed(tflops=300.0, memory_gb_s=2000.0))
    """Of each accelerator that `devices` does not name."""
    cpu: DeviceSpeed = field(default_factory=lambda: DeviceSpeed(tflops=1.0, memory_gb_s=100.0))
    """Of the host, where that is what computes."""
    devices: Mapping[int | str, DeviceSpeed] = field(default_factory=dict)
    """Speeds of single devices by place."""
    staging_slots: int = 3
    """Streamed layers for which an accelerator keeps room: one computes as the next ones arrive."""
    overlap_loss: float = 0.03
    """Part of the copying that shows even behind enough computing, as both take from one memory."""

    def __post_init__(self) -> None:
        _check_positive(self, "bus_gb_s", "disk_gb_s", "peer_gb_s")
        slots = self.staging_slots
        if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
            raise ConfigError(f"`staging_slots={slots!r}` holds no layer. Give a positive integer, such as 3.")
        if not 0 <= self.overlap_loss <= 1:
            raise ConfigError(f"`overlap_loss={self.overlap_loss}` is no part of a whole. Give a number from 0 to 1.")
        for key in self.devices:
            place_key(key, setting="devices")

    def speed(self, place: int | str) -> DeviceSpeed:
        """How fast a place computes."""
        default = self.cpu if place == "cpu" else self.accelerator
        return self.devices.get(place, default)

    def copy_gb_s(self, place: int | str, *, to_cpu: bool) -> float:
        """10^9 bytes a second at which weights come from a place that keeps them: the slowest part of the way."""
        if place == "cpu":
            return self.bus_gb_s
        return self.disk_gb_s if to_cpu else min(self.disk_gb_s, self.bus_gb_s)

    def described(self) -> str:
        """All speeds, as part of a sentence."""
        named = "".join(f", {key}: {each.tflops:g} TFLOP/s" for key, each in self.devices.items())
        return (
            f"bus {self.bus_gb_s:g} GB/s, disk {self.disk_gb_s:g} GB/s, between devices {self.peer_gb_s:g} GB/s, an "
            f"accelerator {self.accelerator.tflops:g} TFLOP/s and {self.accelerator.memory_gb_s:g} GB/s, the host "
            f"{self.cpu.tflops:g} TFLOP/s and {self.cpu.memory_gb_s:g} GB/s{named}"
        )


def _check_positive(settings: DeviceSpeed | Machine, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"`{name}={value!r}` is no speed. Give a positive number.")
