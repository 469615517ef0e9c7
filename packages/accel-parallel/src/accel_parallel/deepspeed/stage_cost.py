"""How long a training step takes under each stage of ZeRO, as DeepSpeed 0.19 exchanges. Pure.

Computation, rings, and what of a collective hides behind computation are those of `auto.cost`. What differs is what is
exchanged, of T trained elements in the dtype that is computed in (arXiv:1910.02054, section 7; measured by
`integration-tests/deepspeed/test_stage.py`):

* **stage 0**: gradients are all-reduced once a window, after backward, where nothing hides them.
* **stages 1 and 2**: gradients are all-reduced in whole buckets, from which each rank takes its part, so that twice T
  travels where the paper has T; once a window at stage 1, in every micro-batch at stage 2, behind nothing. Then the
  weights are gathered, T once a step.
* **stage 3**: T gathered in forward and, but for what stayed gathered, in backward, and T reduce-scattered, in every
  micro-batch; each behind the computation of a block.
* **offload**: divided gradients go to the host and weights come back, and the optimizer steps at the host's speed;
  parameters come from there each time that they are gathered.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from accel_parallel.auto.cost import StepTime, Unit, copies_s, exposed_s, units_of
from accel_parallel.auto.hardware import Hardware
from accel_parallel.auto.layout import Workload
from accel_parallel.auto.links import Group
from accel_parallel.auto.optimizers import OptimizerCost
from accel_parallel.auto.profile import ModelProfile
from accel_parallel.deepspeed.stage_layout import ZeroLayout, ZeroSizes
from accel_parallel.deepspeed.stage_memory import WHOLE_EXCHANGE, Parts

__all__ = ["exchanged_bytes", "zero_time"]

_OVERHEAD = 0.03
"""Of stage 3, for collectives that compute meanwhile, as of sharding in `auto.cost`."""


def zero_time(
    profile: ModelProfile,
    layout: ZeroLayout,
    work: Workload,
    optimizer: OptimizerCost,
    hardware: Hardware,
    sizes: ZeroSizes,
) -> StepTime:
    """How long a step takes, and what of it is not computation."""
    parts = Parts(profile, layout, optimizer)
    units = _units(profile, layout, work, hardware)
    forward = sum(unit.count * unit.forward_s for unit in units)
    backward = sum(unit.count * unit.backward_s for unit in units)
    again = sum(unit.count * unit.forward_s for unit in units[1:]) if layout.checkpointing else 0.0
    steps = work.accumulation_steps
    seconds = {"compute_s": steps * (forward + backward), "recompute_s": steps * again}
    if layout.stage == 3:
        layout = replace(layout, reshard=not _stays_gathered(parts, sizes))
        seconds |= {name: steps * value for name, value in exposed_s(layout, hardware, units).items()}
        seconds["copy_s"] = steps * copies_s(layout, hardware, units)
        seconds["overhead_s"] = _OVERHEAD * steps * (forward + backward)
    elif layout.shard > 1:
        seconds |= _after_backward(parts, steps, hardware, sizes)
    blocks = 1 + sum(kind.count for kind in profile.blocks)
    seconds["offload_s"] = _offload_s(parts, steps, hardware, forward, backward + again, transfers=blocks)
    seconds["optimizer_s"] = _optimizer_s(parts, hardware)
    return StepTime(samples=work.batch_size * steps * layout.data_size, **seconds)


def exchanged_bytes(
    profile: ModelProfile, layout: ZeroLayout, work: Workload, optimizer: OptimizerCost, sizes: ZeroSizes
) -> dict[str, float]:
    """What goes into collectives in a step, by kind: the whole of what is reduced or gathered, in bytes."""
    parts, steps = Parts(profile, layout, optimizer), work.accumulation_steps
    if layout.shard == 1:
        return {}
    if layout.stage == 3:
        gatherings = 1 if _stays_gathered(parts, sizes) else 2
        return {"all_gather": steps * gatherings * parts.weights, "reduce_scatter": steps * parts.gradients}
    reduced = {"all_reduce": (steps if layout.stage == 2 else 1) * parts.gradients}
    return reduced | ({"all_gather": parts.element * parts.trained} if layout.stage else {})


def _units(profile: ModelProfile, layout: ZeroLayout, work: Workload, hardware: Hardware) -> list[Unit]:
    """As of `auto.cost`; but gradients are reduced in the dtype that they are computed in."""
    weights = [profile.root, *(kind.weights for kind in profile.blocks)]
    units = units_of(profile, layout, work, hardware)
    return [
        replace(unit, reduced_bytes=profile.gradient_bytes(each)) for unit, each in zip(units, weights, strict=True)
    ]


def _stays_gathered(parts: Parts, sizes: ZeroSizes) -> bool:
    return 2 * parts.numel <= sizes.stage3_max_reuse_distance  # as far back as it was forward


def _after_backward(parts: Parts, steps: int, hardware: Hardware, sizes: ZeroSizes) -> dict[str, float]:
    """Stages 0 to 2."""
    stage = parts.layout.stage
    group = Group(size=parts.layout.shard, hardware=hardware)
    times = steps if stage == 2 else 1
    buckets = max(1, ceil(parts.trained / (sizes.reduce_bucket_size if stage else WHOLE_EXCHANGE)))
    passes = 6 if stage else 4  # into the bucket, into what is sent, and back: a read and a write each
    return {
        "reduce_s": times * buckets * group.reduce_s(parts.gradients / buckets),
        "gather_s": group.gather_s(parts.element * parts.trained) if stage else 0.0,
        "copy_s": times * passes * parts.gradients / hardware.memory_bytes_per_s,
    }


def _offload_s(
    parts: Parts, steps: int, hardware: Hardware, forward_s: float, backward_s: float, *, transfers: int
) -> float:
    """Copies from and to the host. Stage 3 has a stream for them; before it they keep the device waiting."""
    layout, seconds = parts.layout, 0.0
    if not layout.offload or hardware.host is None:  # without a host of its own, a device computes in host memory
        return seconds
    speed, latency = hardware.host.bytes_per_s, transfers * hardware.host.latency_s
    if layout.optimizer_on_host:
        part = parts.element * parts.trained / parts.ranks / speed
        there = max(0.0, part + latency - (backward_s if layout.stage == 3 else 0.0))
        seconds += (1 if layout.stage == 1 else steps) * there + part
    if layout.params_on_host:
        fetch = parts.weights / parts.ranks / speed + latency
        seconds += steps * (max(0.0, fetch - forward_s) + max(0.0, fetch - backward_s))
    return seconds


def _optimizer_s(parts: Parts, hardware: Hardware) -> float:
    """Weights and states are read and written, gradients read; gradients become float32, and weights come from it."""
    moved = 3.0 * parts.stepped + 2.0 * (parts.states + parts.step_extra)
    if parts.masters:
        moved += 2.0 * (parts.masters + parts.gradients)
    moved /= parts.ranks
    if not parts.layout.optimizer_on_host or hardware.host is None:
        return moved / hardware.memory_bytes_per_s
    processes = min(parts.layout.world_size, hardware.devices_per_node)
    return moved * processes / hardware.host_memory_bytes_per_s
