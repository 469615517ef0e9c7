"""How long a training step takes, in parts. Pure.

* **Compute**: floating-point operations counted by the profile, or, where that takes longer, the time to move weights
  and activations through the device's memory (the roofline of Williams et al., CACM 2009). Checkpointing adds one more
  forward of the blocks.
* **Exposed communication**: what of a collective does not fit behind the computation that runs meanwhile. A block is
  gathered while the one before computes, and reduced while the next one does, so each exposes what it is longer; the
  first and the last have nothing to hide behind. DDP reduces buckets behind backward (arXiv:2006.15704, section 3.2.3).
  Volumes are those of ZeRO (arXiv:1910.02054, section 7): gathering twice a micro-batch with resharding, once without.
* **Tensor parallel**: two all-reduces of the hidden states a block and direction (Shoeybi et al., "Megatron-LM",
  arXiv:1909.08053, section 3), two more where forward is computed again. Nothing hides them.
* **Optimizer**: parameters and states are read and written once, gradients read. Offloaded, at the host's speed.
* **Copies** of gathered units out of, and of gradients into, the flat buffers that are exchanged.
* **Overhead**: a share of compute for what is not modelled, such as collectives that take multiprocessors away.

A window exchanges DDP's gradients once; sharded ones are reduced every micro-batch, so that they stay sharded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from accel_parallel.auto.hardware import Hardware
from accel_parallel.auto.layout import Layout, Workload
from accel_parallel.auto.links import Group
from accel_parallel.auto.optimizers import OptimizerCost
from accel_parallel.auto.profile import Growth, ModelProfile, Weights

__all__ = ["StepTime", "Unit", "copies_s", "exposed_s", "predict_time", "units_of"]

_OVERHEAD = {"single": 0.0, "ddp": 0.0, "fsdp": 0.03}
_BUCKET_BYTES = 25 * 2**20
"""Of DDP, by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, all micro-batches of its window included."""

    compute_s: float = 0.0
    recompute_s: float = 0.0
    """Of it the second forward of checkpointed blocks; not counted in `compute_s`."""
    gather_s: float = 0.0
    """All-gathers that are not hidden."""
    scatter_s: float = 0.0
    """Reduce-scatters that are not hidden."""
    reduce_s: float = 0.0
    """All-reduces of gradients that are not hidden."""
    tensor_s: float = 0.0
    """All-reduces of tensor parallel."""
    offload_s: float = 0.0
    """Copies from and to the host that are not hidden."""
    optimizer_s: float = 0.0
    copy_s: float = 0.0
    """Copies into and out of flat buffers."""
    overhead_s: float = 0.0
    samples: int = 1
    """Samples that all processes train on in that step."""

    @property
    def total_s(self) -> float:
        """The step."""
        return sum(value for _, value in self.parts())

    @property
    def per_sample_s(self) -> float:
        """Seconds a sample. Candidates are compared by it, since tensor parallel leaves fewer samples a step.

        To nine digits, so that sums that differ in the order of their terms alone are equal.
        """
        return float(f"{self.total_s / self.samples:.9g}")

    @property
    def communication_s(self) -> float:
        """All exposed communication between devices."""
        return self.gather_s + self.scatter_s + self.reduce_s + self.tensor_s

    def parts(self) -> tuple[tuple[str, float], ...]:
        """The parts by name."""
        return tuple((each.name, getattr(self, each.name)) for each in fields(self) if each.name != "samples")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A block or the root: seconds of its computation, and bytes of what is exchanged for it."""

    count: int
    forward_s: float
    backward_s: float
    gathered_bytes: float
    reduced_bytes: float


def predict_time(
    profile: ModelProfile, layout: Layout, work: Workload, optimizer: OptimizerCost, hardware: Hardware
) -> StepTime:
    """How long a step takes, and what of it is not computation."""
    units = units_of(profile, layout, work, hardware)
    forward = sum(unit.count * unit.forward_s for unit in units)
    backward = sum(unit.count * unit.backward_s for unit in units)
    again = sum(unit.count * unit.forward_s for unit in units[1:]) if layout.checkpointing else 0.0
    steps = work.accumulation_steps
    parts = {"compute_s": steps * (forward + backward), "recompute_s": steps * again}
    if layout.strategy == "ddp":
        parts["reduce_s"] = _ddp_s(profile, layout, hardware, backward + again)
    elif layout.strategy == "fsdp":
        exposed = exposed_s(layout, hardware, units)
        parts |= {name: steps * value for name, value in exposed.items()}
        parts["copy_s"] = steps * copies_s(layout, hardware, units)
        parts["tensor_s"] = steps * _tensor_s(profile, layout, work, hardware)
        if layout.offload:
            parts["offload_s"] = steps * _offload_s(profile, layout, hardware, forward, backward)
    parts["overhead_s"] = _OVERHEAD[layout.strategy] * steps * (forward + backward)
    parts["optimizer_s"] = _optimizer_s(profile, layout, optimizer, hardware)
    return StepTime(samples=work.batch_size * steps * layout.data_size, **parts)


def units_of(profile: ModelProfile, layout: Layout, work: Workload, hardware: Hardware) -> list[Unit]:
    """The root first, then each kind of block."""
    footprint = profile.sharded if layout.strategy == "fsdp" else profile.whole
    rate = hardware.flops_of(profile.compute_dtype)

    def unit(weights: Weights, count: int, forward: Growth, backward: Growth, kept: Growth) -> Unit:
        local = weights.share(layout.tp)
        moved = local * profile.gathered_bytes(weights) + kept.at(work.batch_size, work.sequence_length)
        seconds = [
            max(
                # Without a divided matrix nothing is computed by fewer ranks.
                flops.at(work.batch_size, work.sequence_length) * local / rate,
                passes * moved / hardware.memory_bytes_per_s,
            )
            for flops, passes in ((forward, 1), (backward, 2))
        ]
        return Unit(
            count=count, forward_s=seconds[0], backward_s=seconds[1],
            gathered_bytes=local * profile.gathered_bytes(weights),
            reduced_bytes=local * profile.reduced_bytes(weights),
        )  # fmt: skip

    outside = footprint.stem + footprint.head
    units = [unit(profile.root, 1, footprint.root_forward_flops, footprint.root_backward_flops, outside)]
    for kind, each in zip(profile.blocks, footprint.blocks, strict=True):
        units.append(unit(kind.weights, kind.count, each.forward_flops, each.backward_flops, each.kept))
    return units


def _ddp_s(profile: ModelProfile, layout: Layout, hardware: Hardware, backward_s: float) -> float:
    """Gradients are averaged bucket by bucket behind backward; the last bucket has nothing left to hide behind."""
    size_bytes = float(profile.trainable_bytes)
    if not size_bytes:
        return 0.0
    buckets = max(1, round(size_bytes / _BUCKET_BYTES))
    one = Group(size=layout.replicate, hardware=hardware).reduce_s(size_bytes / buckets)
    return max(one, buckets * one - backward_s)


def exposed_s(layout: Layout, hardware: Hardware, units: list[Unit]) -> dict[str, float]:
    """Of one micro-batch under `fully_shard`."""
    shards = Group(size=layout.shard, stride=layout.tp, hardware=hardware)
    copies = Group(size=layout.replicate, stride=layout.tp * layout.shard, hardware=hardware)
    exposed = {"gather_s": 0.0, "scatter_s": 0.0, "reduce_s": 0.0}
    for index, unit in enumerate(units):
        gather = shards.gather_s(unit.gathered_bytes)
        scatter = shards.gather_s(unit.reduced_bytes)
        reduce = copies.reduce_s(unit.reduced_bytes / layout.shard)
        if index == 0:  # the root is gathered before anything computes, and reduced after everything did
            exposed = {"gather_s": gather, "scatter_s": scatter, "reduce_s": reduce}
            continue
        again = unit.forward_s if layout.checkpointing else 0.0
        exposed["gather_s"] += unit.count * max(0.0, gather - unit.forward_s)
        in_backward = gather if layout.reshard else 0.0
        hidden = unit.backward_s + again
        along_shards = max(0.0, in_backward + scatter - hidden)
        if along_shards:
            share = in_backward / (in_backward + scatter)
            exposed["gather_s"] += unit.count * share * along_shards
            exposed["scatter_s"] += unit.count * (1.0 - share) * along_shards
        # Copies are averaged over other links than shards use, unless both leave the node.
        beside = in_backward + scatter if shards.leaves_node and copies.leaves_node else 0.0
        exposed["reduce_s"] += unit.count * max(0.0, reduce + beside - hidden - (along_shards if beside else 0.0))
    return exposed


def copies_s(layout: Layout, hardware: Hardware, units: list[Unit]) -> float:
    """Each gathering is copied out of one flat buffer, and gradients into one: a read and a write."""
    passes = 2 if layout.reshard else 1
    moved = sum(unit.count * (2 * passes * unit.gathered_bytes + 2 * unit.reduced_bytes) for unit in units)
    return moved / hardware.memory_bytes_per_s


def _tensor_s(profile: ModelProfile, layout: Layout, work: Workload, hardware: Hardware) -> float:
    """Of one micro-batch: four all-reduces a block, six where forward runs twice."""
    if layout.tp == 1:
        return 0.0
    element = 2.0 if profile.is_mixed or profile.dtype in ("bfloat16", "float16") else 4.0
    hidden = element * (profile.hidden_size or 0) * work.batch_size * work.sequence_length
    times = 6 if layout.checkpointing else 4
    blocks = sum(kind.count for kind in profile.blocks)
    return times * blocks * Group(size=layout.tp, hardware=hardware).reduce_s(hidden)


def _offload_s(profile: ModelProfile, layout: Layout, hardware: Hardware, forward_s: float, backward_s: float) -> float:
    """Shards come from the host each time they are gathered, gradients go there; what fits behind compute is hidden."""
    assert hardware.host is not None
    speed = hardware.host.bytes_per_s
    part = _local_bytes(profile, layout, "size_bytes") / layout.shard
    gradients = _local_bytes(profile, layout, "trainable_bytes") / layout.shard
    latency = hardware.host.latency_s * (1 + sum(kind.count for kind in profile.blocks))
    forward = max(0.0, part / speed + latency - forward_s)
    backward = max(0.0, ((part if layout.reshard else 0.0) + gradients) / speed + latency - backward_s)
    return forward + backward


def _optimizer_s(profile: ModelProfile, layout: Layout, optimizer: OptimizerCost, hardware: Hardware) -> float:
    trained = _local_bytes(profile, layout, "trainable_bytes") / layout.shard
    numel = _local_bytes(profile, layout, "trainable_numel") / layout.shard
    moved = 3.0 * trained + 2.0 * optimizer.kept_bytes(numel=numel, size_bytes=trained)
    moved += 2.0 * optimizer.step_extra * trained
    if not layout.offload:
        return moved / hardware.memory_bytes_per_s
    return moved * min(layout.world_size, hardware.devices_per_node) / hardware.host_memory_bytes_per_s


def _local_bytes(profile: ModelProfile, layout: Layout, field: str) -> float:
    """The sum of a field of `Weights` over what one tensor-parallel rank holds."""
    blocks = sum(
        kind.count * kind.weights.share(layout.tp) * float(getattr(kind.weights, field)) for kind in profile.blocks
    )
    return profile.root.share(layout.tp) * float(getattr(profile.root, field)) + blocks
