"""What fits: the candidates of a world and the limits that they are held against. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from accel_parallel.auto.hardware import Hardware
from accel_parallel.auto.layout import Layout, Workload, layouts, ranks_per_node
from accel_parallel.auto.memory import Memory, predict_memory
from accel_parallel.auto.optimizers import OptimizerCost
from accel_parallel.auto.profile import ModelProfile

__all__ = ["Search"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """One question: this model, on devices of this kind, with these sizes."""

    profile: ModelProfile
    hardware: Hardware
    work: Workload
    optimizer: OptimizerCost
    reserve: float
    offload: bool

    @property
    def limit_bytes(self) -> int:
        """Of a device's memory, what may be used."""
        return int(self.hardware.memory_bytes * (1.0 - self.reserve))

    def layouts(self, world_size: int) -> Iterator[Layout]:
        """Every candidate for a world of that size."""
        return layouts(
            self.profile,
            world_size=world_size,
            devices_per_node=self.hardware.devices_per_node,
            offload=self.offload,
        )

    def memory(self, layout: Layout) -> Memory:
        """What one of its ranks needs."""
        return predict_memory(self.profile, layout, self.work, self.optimizer)

    def fits(self, memory: Memory, world_size: int) -> bool:
        """Whether a device has that much, and a host for all of its processes."""
        on_host = memory.host_bytes * ranks_per_node(world_size, self.hardware.devices_per_node)
        return memory.total <= self.limit_bytes and self.fits_host(on_host)

    def fits_host(self, size_bytes: float) -> bool:
        """Whether a host has that much."""
        return size_bytes <= self.hardware.host_memory_bytes * (1.0 - self.reserve) or size_bytes == 0
