"""What a plan runs on: memory, speed, and the links between devices, nodes and hosts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from accel_parallel.auto.profile import DTypeName
from accel_state.errors import ConfigError

__all__ = ["Hardware", "Link"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A way for data, in the alpha-beta model: a message of n bytes takes ``latency_s + n / bytes_per_s``."""

    bytes_per_s: float
    """In one direction, for one device."""
    latency_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise ConfigError(
                f"`Link(bytes_per_s={self.bytes_per_s!r}, latency_s={self.latency_s!r})` moves nothing. Give a "
                f"positive bandwidth in bytes a second and a latency in seconds."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The devices of a run, all alike. `detect_hardware` fills it in; measured figures of your own are better."""

    name: str
    memory_bytes: int
    """Of one device."""
    flops_per_s: Mapping[DTypeName, float]
    """Peak of matrix multiplication of one device by dtype; ``float32`` stands in for what is missing."""
    memory_bytes_per_s: float
    """Between a device and its own memory."""
    devices_per_node: int = 1
    """Processes on each node, one a device."""
    intra_node: Link
    """Between two devices of a node."""
    inter_node: Link
    """Between nodes, for one device: a node's whole bandwidth divided by its devices."""
    host: Link | None = None
    """Between a device and its host's memory; ``None``: nothing can be offloaded, as on a CPU."""
    host_memory_bytes: int = 0
    """Of one node."""
    host_memory_bytes_per_s: float = 100e9
    """Between a node's processors and its memory, where offloaded optimizers step."""
    efficiency: float = 0.45
    """Part of the peak that matrix multiplications of a real training step reach."""
    steps_at_once: bool = True
    """Whether torch's optimizers step over all parameters at once (``foreach``), as they do on accelerators."""
    assumed: tuple[str, ...] = field(default=())
    """Figures that were assumed instead of detected, in words."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bytes_per_s", "devices_per_node", "host_memory_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}={getattr(self, name)!r}` describes no device. Give a positive number.")
        if "float32" not in self.flops_per_s or not all(value > 0 for value in self.flops_per_s.values()):
            raise ConfigError(
                f"`flops_per_s={dict(self.flops_per_s)!r}` does not say how fast the device multiplies. "
                f"Give operations a second for 'float32' at least, and for lower precisions where it has them."
            )
        if not 0 < self.efficiency <= 1:
            raise ConfigError(
                f"`efficiency={self.efficiency!r}` is no part of the peak. Give a number over 0, at most 1."
            )

    def flops_of(self, dtype: DTypeName) -> float:
        """Operations a second that a training step reaches in `dtype`."""
        return self.efficiency * self.flops_per_s.get(dtype, self.flops_per_s["float32"])

    def num_nodes(self, world_size: int) -> int:
        """Nodes that `world_size` processes fill."""
        return -(-world_size // self.devices_per_node)
