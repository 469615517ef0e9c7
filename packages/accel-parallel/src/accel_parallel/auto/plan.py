"""What was chosen, and what it was chosen from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel_parallel.auto.cost import StepTime
from accel_parallel.auto.hardware import Hardware
from accel_parallel.auto.layout import Layout, StrategyName, Workload
from accel_parallel.auto.memory import Memory
from accel_parallel.auto.optimizers import OptimizerCost
from accel_parallel.auto.profile import ModelProfile
from accel_parallel.parallelism import ParallelismConfig

if TYPE_CHECKING:
    from accel_parallel.fsdp_plugin import FullyShardedDataParallelPlugin

__all__ = ["Candidate", "Plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to spread the run, and what is predicted for it."""

    layout: Layout
    memory: Memory
    """Of one rank."""
    time: StepTime
    fits: bool
    """Whether device and host have that much."""

    @property
    def rank(self) -> tuple[object, ...]:
        """Smaller is better: faster, and of two that are equally fast the simpler one."""
        return (self.time.per_sample_s, self.layout.simplicity)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a run is spread over its processes, chosen by `select_plan`. ``print(plan.explain())`` says why."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """All that were compared, those that fit first, faster ones first."""
    profile: ModelProfile
    hardware: Hardware
    work: Workload
    optimizer: OptimizerCost
    limit_bytes: int
    """Of a device's memory, what may be used."""
    reasons: tuple[str, ...]
    """Why this one, and why not the nearest others."""

    @property
    def strategy(self) -> StrategyName:
        """Name of the strategy."""
        return self.chosen.layout.strategy

    @property
    def parallelism(self) -> ParallelismConfig:
        """Number of processes along each axis."""
        return self.chosen.layout.parallelism()

    @property
    def reshard_after_forward(self) -> bool | None:
        """Whether sharded units are given up after forward; ``None`` without sharding."""
        return self.chosen.layout.reshard

    @property
    def activation_checkpointing(self) -> bool:
        """Whether blocks are computed a second time in backward."""
        return self.chosen.layout.checkpointing

    @property
    def cpu_offload(self) -> bool:
        """Whether parameters, gradients and optimizer states stay in host memory."""
        return self.chosen.layout.offload

    @property
    def samples_per_step(self) -> int:
        """Samples of all processes and micro-batches of one optimizer step. Tensor parallel leaves fewer."""
        return self.chosen.time.samples

    def fsdp_plugin(self) -> FullyShardedDataParallelPlugin | None:
        """The options of a sharded run, ``None`` for another. Under DDP, checkpoint activations by hand."""
        from accel_parallel.fsdp_plugin import FullyShardedDataParallelPlugin

        if self.strategy != "fsdp":
            return None
        return FullyShardedDataParallelPlugin(
            reshard_after_forward=self.chosen.layout.reshard is not False,
            activation_checkpointing=self.activation_checkpointing,
            cpu_offload=self.cpu_offload,
        )

    def explain(self, *, limit: int = 12) -> str:
        """All of it as text: what was planned for, the candidates as a table, the parts of the chosen one, and why.

        Args:
            limit: most candidates to show.
        """
        from accel_parallel.auto.report import report

        return report(self, limit=limit)
