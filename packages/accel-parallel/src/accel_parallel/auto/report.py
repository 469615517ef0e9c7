"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel_parallel.auto.text import aligned, gib, largest_parts, seconds, time_parts

if TYPE_CHECKING:
    from accel_parallel.auto.plan import Candidate, Plan

__all__ = ["report"]

_HEADER = ("  plan", "memory", "fits", "step", "samples/s", "compute", "exchange", "host", "other")


def report(plan: Plan, *, limit: int) -> str:
    """What was planned for, the candidates, and why; see `Plan.explain`."""
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
