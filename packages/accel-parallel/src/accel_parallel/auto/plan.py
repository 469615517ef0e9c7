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
from accel_parallel.auto.text import aligned, gib, largest_parts, seconds, time_parts
from accel_parallel.parallelism import ParallelismConfig

if TYPE_CHECKING:
    from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin

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
        from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin

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
        return _report(self, limit=limit)


_HEADER = ("  plan", "memory", "fits", "step", "samples/s", "compute", "exchange", "host", "other")


def _report(plan: Plan, *, limit: int) -> str:
    shown = list(plan.candidates[:limit])
    first_that_does_not_fit = next((each for each in plan.candidates if not each.fits), None)
    if first_that_does_not_fit is not None and first_that_does_not_fit not in shown:
        shown = [*shown[: max(1, limit - 1)], first_that_does_not_fit]
    lines = [*_asked(plan), ""]
    lines += aligned([_HEADER, *(_row(each, chosen=each is plan.chosen) for each in shown)])
    left = len(plan.candidates) - len(shown)
    if left > 0:
        lines.append(f"  and {left} more candidates")
    memory, time = plan.chosen.memory, plan.chosen.time
    lines += ["", f"memory of a process, at the {memory.moment}: {largest_parts(memory, limit=9)}"]
    if memory.host_bytes:
        lines.append(f"memory of the host, for each process: {gib(memory.host_bytes)}")
    parts = sorted(time_parts(time).items(), key=lambda part: -part[1])
    spent = ", ".join(f"{name} {seconds(value * time.samples)}" for name, value in parts if value > 0)
    lines.append(f"a step: {spent}")
    lines += ["", *plan.reasons]
    notes = [*plan.profile.notes, *plan.hardware.assumed]
    if notes:
        lines += ["", *(f"assumed: {note}" for note in notes)]
    return "\n".join(lines)


def _asked(plan: Plan) -> list[str]:
    profile, hardware, work = plan.profile, plan.hardware, plan.work
    world_size = plan.chosen.layout.world_size
    trained = "all" if profile.num_trainable == profile.num_parameters else f"{profile.num_trainable:,}"
    stored = f"stored in {profile.dtype}, mixed precision {profile.precision}"
    usable = f"{gib(plan.limit_bytes)} of {gib(hardware.memory_bytes)}"
    tokens = "" if profile.sequence_length is None else f" of {work.sequence_length:,} tokens"
    return [
        f"{profile.name}: {profile.num_parameters:,} parameters, {trained} trained, {stored}, {plan.optimizer.name}",
        f"{world_size} x {hardware.name} on {hardware.num_nodes(world_size)} node(s), {usable} of each",
        f"micro-batches of {work.batch_size} samples{tokens}, {work.accumulation_steps} a step",
    ]


def _row(candidate: Candidate, *, chosen: bool) -> tuple[str, ...]:
    time = candidate.time
    compute = time.compute_s + time.recompute_s
    other = time.total_s - compute - time.communication_s - time.offload_s
    return (
        f"{'*' if chosen else ' '} {candidate.layout}",
        gib(candidate.memory.total),
        "yes" if candidate.fits else "no",
        seconds(time.total_s),
        f"{1 / time.per_sample_s:,.1f}",
        seconds(compute),
        seconds(time.communication_s),
        seconds(time.offload_s),
        seconds(other),
    )
