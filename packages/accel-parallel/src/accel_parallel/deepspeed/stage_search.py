"""What fits under ZeRO: candidates, the memory and time of each, and which of them save anything. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from accel_parallel.auto.cost import StepTime
from accel_parallel.auto.hardware import Hardware
from accel_parallel.auto.layout import Layout, ranks_per_node
from accel_parallel.auto.memory import Memory
from accel_parallel.auto.optimizers import OptimizerCost, optimizer_cost
from accel_parallel.auto.plan import Candidate
from accel_parallel.auto.search import Search
from accel_parallel.auto.text import gib
from accel_parallel.deepspeed.stage_cost import zero_time
from accel_parallel.deepspeed.stage_layout import HostDevice, ZeroLayout, ZeroSizes, zero_layouts
from accel_parallel.deepspeed.stage_memory import zero_memory

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["StageSearch", "stepping_costs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSearch(Search):
    """One question: this model under ZeRO. `optimizer` is what the step of whole parameters costs."""

    sizes: ZeroSizes
    flat: OptimizerCost
    """What a step over one flat tensor costs."""
    on_host: OptimizerCost
    """What it costs on the host."""
    host_reserve: float
    """Part of host memory that is left alone."""
    offload_optimizer: HostDevice | None = None
    """Where optimizer states are, if that is settled."""
    offload_param: HostDevice | None = None
    """Where parameters are, likewise."""
    checkpointing: bool = False

    def layouts(self, world_size: int) -> Iterator[ZeroLayout]:
        """Every candidate for a world of that size, simpler ones first."""
        return zero_layouts(
            world_size=world_size, offload=self.offload, optimizer=self.offload_optimizer, params=self.offload_param,
            checkpointing=self.checkpointing,
        )  # fmt: skip

    def memory(self, layout: Layout) -> Memory:
        """What one of its ranks needs."""
        layout = cast("ZeroLayout", layout)
        found = zero_memory(self.profile, layout, self.work, self._stepping(layout), self.sizes)
        if self.hardware.host is None:  # the device computes in host memory
            return replace(found, optimizer=found.optimizer + found.host_bytes, host_bytes=0.0)
        return found

    def time(self, layout: ZeroLayout) -> StepTime:
        """How long a step takes."""
        return zero_time(self.profile, layout, self.work, self._stepping(layout), self.hardware, self.sizes)

    def fits_host(self, size_bytes: float) -> bool:
        """Whether a host has that much."""
        return size_bytes <= self.hardware.host_memory_bytes * (1.0 - self.host_reserve) or size_bytes == 0

    def candidates(self, world_size: int) -> Iterator[Candidate]:
        """Every layout with what is predicted for it, simpler ones first."""
        for layout in self.layouts(world_size):
            memory = self.memory(layout)
            yield Candidate(layout=layout, memory=memory, time=self.time(layout), fits=self.fits(memory, world_size))

    def useful(self, candidates: Sequence[Candidate], world_size: int) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
        """Those that need less than every simpler one that the host has room for, and a sentence for each other one.

        Args:
            candidates: simpler ones first.
            world_size: number of processes.
        """
        kept: list[Candidate] = []
        left_out = []
        leanest: Candidate | None = None
        for each in candidates:
            if not self.fits_host(each.memory.host_bytes * ranks_per_node(world_size, self.hardware.devices_per_node)):
                kept.append(each)  # to be shown
            elif leanest is None or each.memory.total < leanest.memory.total:
                kept.append(each)
                leanest = each
            else:
                left_out.append(
                    f"{each.layout} is left out, as it saves nothing: {gib(each.memory.total)} a process at the "
                    f"{each.memory.moment}, and {leanest.layout} {gib(leanest.memory.total)}."
                )
        return tuple(kept), tuple(left_out)

    def _stepping(self, layout: ZeroLayout) -> OptimizerCost:
        if layout.optimizer_on_host:
            return self.on_host
        return self.flat if layout.stage else self.optimizer


_OF_DEEPSPEED = {
    "DeepSpeedCPUAdagrad": "adagrad",
    "DeepSpeedCPUAdam": "adamw",
    "DeepSpeedCPULion": "lion",
    "DummyOptim": "adamw",
    "FusedAdam": "adamw",
    "FusedLamb": "adamw",
    "FusedLion": "lion",
}
"""Optimizers that DeepSpeed compiles and what they keep, without temporaries; the placeholder stands for AdamW."""


def stepping_costs(
    optimizer: str | OptimizerCost | Optimizer, hardware: Hardware
) -> tuple[OptimizerCost, OptimizerCost, OptimizerCost]:
    """What a step costs over whole parameters, over one flat tensor, and over one on the host.

    DeepSpeed flattens what a rank steps over. Where torch steps over one tensor after the other, that is all of it at
    once, and for Adam a square root and a quotient of that size (torch/optim/adam.py).

    Raises:
        ConfigError: for an optimizer that is not known.
    """
    own = _OF_DEEPSPEED.get(type(optimizer).__name__)
    if own is not None:
        cost = replace(optimizer_cost(own), name=type(optimizer).__name__, step_extra=0.0)
        return cost, cost, cost
    cost = optimizer_cost(optimizer)
    extra, one_by_one = cost.step_extra, not hardware.steps_at_once
    defaults = getattr(optimizer, "defaults", {})
    if defaults.get("foreach") is False and not defaults.get("fused"):
        extra, one_by_one = optimizer_cost(type(optimizer).__name__).step_extra, True
    return (
        cost if hardware.steps_at_once else replace(cost, step_extra=0.0),
        replace(cost, step_extra=(2.0 if one_by_one else 1.0) * extra),
        replace(cost, step_extra=2.0 * extra),
    )
