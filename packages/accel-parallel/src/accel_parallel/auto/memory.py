"""How much memory a rank needs at the worst moment of a training step. Pure.

Four moments are compared: the loss, when all activations are there; backward through a block, when its gradients and
what it was gathered in come on top; the end of backward; and the optimizer's step. What each holds:

* **Parameters, gradients, optimizer states**: whole on every rank, or the part of one of `shard` ranks (stages 1 to 3
  of Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 5). Optimizer states are there from the second step on, so
  they count throughout. Gradients come in the order of backward, unless a window holds those of earlier micro-batches.
* **DDP's buckets**: gradients once more, where they are exchanged (Li et al., arXiv:2006.15704, section 3.2).
* **Gathered units** (`fully_shard`): the root from its forward to the end of backward, the current block, and the next
  one as one flat buffer, since it is gathered ahead (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). Without
  resharding every block that backward has not been through. Gradients of the root's last layers stay whole until the
  end; those of a block until it is reduced, in a buffer that is kept for one more block.
* **Activations**: with checkpointing each block's output only, and one block in full while it is computed again
  (Chen et al., arXiv:1604.06174; Korthikanti et al., arXiv:2205.05198, section 5). Tensor parallel divides what lies
  between a divided matrix and its counterpart (section 4.2.1 there).
* **Offload** keeps parameters, gradients and states in host memory, so that only gathered units are on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from accel_parallel.auto.layout import Layout, Workload
from accel_parallel.auto.optimizers import OptimizerCost
from accel_parallel.auto.profile import Footprint, Growth, ModelProfile, UnitPass, Weights

__all__ = ["Memory", "Sizes", "predict_memory"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank at the moment when it needs most."""

    parameters: float = 0.0
    """What the rank holds of them, buffers included."""
    gradients: float = 0.0
    """Of parameters: its part of them, and whole ones that are not reduced yet."""
    optimizer: float = 0.0
    """States, and temporaries of a step."""
    gathered: float = 0.0
    """Parameters of the units that are whole at that moment, and of the next one."""
    copies: float = 0.0
    """Weights in lower precision, which autocast keeps."""
    activations: float = 0.0
    logits: float = 0.0
    """What comes after the last block: logits, loss, and their gradients."""
    buckets: float = 0.0
    """In which DDP exchanges gradients."""
    communication: float = 0.0
    """Buffers of reduce-scatters and of tensor parallel's all-reduces."""
    moment: str = ""
    """When that is."""
    host_bytes: float = 0.0
    """In host memory, for this rank, at any time."""

    @property
    def total(self) -> int:
        """All that is on the device."""
        return round(sum(value for _, value in self.parts()))

    def parts(self) -> tuple[tuple[str, float], ...]:
        """The parts on the device by name."""
        return tuple((each.name, getattr(self, each.name)) for each in fields(self) if each.name not in _OTHERS)


_OTHERS = ("moment", "host_bytes")


def predict_memory(profile: ModelProfile, layout: Layout, work: Workload, optimizer: OptimizerCost) -> Memory:
    """The most that one rank needs at once in a training step, in parts."""
    run = Sizes(profile, layout, work)
    moments = _sharded(run, optimizer) if layout.strategy == "fsdp" else _whole(run, optimizer)
    return max(moments, key=lambda memory: memory.total)


class Sizes:
    """What one candidate's micro-batch holds on one rank, and how its weights divide along ``tp``."""

    def __init__(self, profile: ModelProfile, layout: Layout, work: Workload) -> None:
        self.profile = profile
        self.layout = layout
        self.work = work
        self.counts = tuple(kind.count for kind in profile.blocks)
        self.kinds = range(len(self.counts))
        self.footprint: Footprint = profile.sharded if layout.strategy == "fsdp" else profile.whole
        self.root = self._local(profile.root)
        self.blocks = tuple(self._local(kind.weights) for kind in profile.blocks)
        self.stays = tuple(self._stays(unit) for unit in self.footprint.blocks)
        self.worst = tuple(self._worst(unit) for unit in self.footprint.blocks)

    def at(self, growth: Growth) -> float:
        """`growth` for this run's micro-batch."""
        return growth.at(self.work.batch_size, self.work.sequence_length)

    def total(self, field: str) -> float:
        """The sum of one field of `Weights` over all units."""
        blocks = sum(count * getattr(each, field) for count, each in zip(self.counts, self.blocks, strict=True))
        return float(getattr(self.root, field) + blocks)

    def live(self, kind: int, remaining: int) -> float:
        """Activations while backward goes through a block of `kind`, of which it is the last of `remaining`."""
        before = sum(self.counts[each] * self.stays[each] for each in range(kind))
        return self.at(self.footprint.stem) + before + (remaining - 1) * self.stays[kind] + self.worst[kind]

    def places(self) -> Iterator[tuple[int, int]]:
        """Blocks whose backward may be the worst: memory is linear in between."""
        for kind in reversed(self.kinds):
            count = self.counts[kind]
            yield from ((kind, remaining) for remaining in sorted({count, max(1, count - 1), 1}, reverse=True))

    def trained_bytes(self, kind: int, remaining: int) -> float:
        """Of the blocks that backward has been through, before that place."""
        later = sum(self.counts[each] * self.blocks[each].trainable_bytes for each in self.kinds if each > kind)
        return float(later + (self.counts[kind] - remaining) * self.blocks[kind].trainable_bytes)

    def _local(self, weights: Weights) -> Weights:
        share = weights.share(self.layout.tp)
        return Weights(
            numel=round(share * weights.numel),
            size_bytes=round(share * weights.size_bytes),
            trainable_numel=round(share * weights.trainable_numel),
            trainable_bytes=round(share * weights.trainable_bytes),
        )

    def _divided(self, unit: UnitPass) -> float:
        return 1.0 - unit.tp_share * (1.0 - 1.0 / self.layout.tp)

    def _stays(self, unit: UnitPass) -> float:
        return self.at(unit.output) if self.layout.checkpointing else self.at(unit.kept) * self._divided(unit)

    def _worst(self, unit: UnitPass) -> float:
        extra = self.at(unit.backward_extra)
        if self.layout.checkpointing:  # its forward runs again, while the gradient of its output waits
            extra = max(extra, self.at(unit.forward_extra) + self.at(unit.output))
        return (self.at(unit.kept) + extra) * self._divided(unit)


def _whole(run: Sizes, optimizer: OptimizerCost) -> Iterator[Memory]:
    """One process, or DDP."""
    profile, footprint = run.profile, run.footprint
    trained = run.total("trainable_bytes")
    states = optimizer.kept_bytes(numel=run.total("trainable_numel"), size_bytes=trained)
    buckets = trained if run.layout.strategy == "ddp" else 0.0
    parameters = run.total("size_bytes") + profile.buffer_bytes
    earlier = run.work.accumulation_steps > 1
    casts = [unit.cast_bytes for unit in footprint.blocks]
    stem = run.at(footprint.stem)

    def memory(moment: str, gradients: float, added: float = 0.0, **parts: float) -> Memory:
        held = (trained if earlier else gradients) + added
        return Memory(
            moment=moment, parameters=parameters, gradients=held, buckets=buckets,
            **{"optimizer": states, **parts},
        )  # fmt: skip

    live = stem + sum(count * stays for count, stays in zip(run.counts, run.stays, strict=True))
    all_casts = footprint.root_cast_bytes + sum(count * cast for count, cast in zip(run.counts, casts, strict=True))
    # Autocast lets go of its copies after forward; what is not computed again is kept by the graph besides.
    kept_casts = footprint.root_cast_bytes if run.layout.checkpointing else all_casts
    logits, extra = run.at(footprint.head), run.at(footprint.head_extra)
    yield memory("loss", 0.0, activations=live, logits=logits, copies=all_casts)
    yield memory("loss", 0.0, activations=live, logits=logits + extra, copies=kept_casts)
    for kind, remaining in run.places():
        # Checkpointing makes the copies of a block anew with it.
        kept = 0.0 if run.layout.checkpointing else sum(run.counts[each] * casts[each] for each in range(kind))
        copies = kept + (1 if run.layout.checkpointing else remaining) * casts[kind]
        done = profile.head_share * run.root.trainable_bytes + run.trained_bytes(kind, remaining)
        yield memory(
            "backward",
            done + run.blocks[kind].trainable_bytes,
            activations=run.live(kind, remaining),
            copies=footprint.root_cast_bytes + copies,
        )
    # Two gradients of a tied parameter and their sum are there at once.
    meeting = 2.0 * profile.tied_share * run.root.trainable_bytes
    yield memory("end of backward", trained, meeting, activations=stem)
    yield memory("optimizer step", trained, optimizer=states + optimizer.step_extra * trained)


def _sharded(run: Sizes, optimizer: OptimizerCost) -> Iterator[Memory]:
    """`fully_shard`, of each block and of the root around them."""
    profile, footprint, layout = run.profile, run.footprint, run.layout
    size = layout.shard
    trained = run.total("trainable_bytes") / size
    states = optimizer.kept_bytes(numel=run.total("trainable_numel") / size, size_bytes=trained)
    parameters = run.total("size_bytes") / size
    here = 0.0 if layout.offload else 1.0
    host = 0.0 if here else parameters + trained + states + optimizer.step_extra * trained
    earlier = run.work.accumulation_steps > 1
    root, blocks = profile.gathered_bytes(run.root), [profile.gathered_bytes(each) for each in run.blocks]
    # One rank alone gathers nothing, but copies its parameters for use all the same.
    ahead = [each if size > 1 else 0.0 for each in blocks]
    reduced = [profile.reduced_bytes(each) for each in run.blocks]
    hidden = Growth(per_token=(2.0 if profile.is_mixed else 4.0) * (profile.hidden_size or 0))
    exchange = run.at(hidden) if layout.tp > 1 else 0.0
    stem = run.at(footprint.stem)

    def memory(moment: str, gradients: float, whole: float = 0.0, communication: float = 0.0, **parts: float) -> Memory:
        held = here * (trained if earlier else gradients / size)
        return Memory(
            moment=moment, host_bytes=host, parameters=here * parameters + profile.buffer_bytes,
            gradients=held + whole, communication=communication, **{"optimizer": here * states, **parts},
        )  # fmt: skip

    gathered = sum(count * each for count, each in zip(run.counts, blocks, strict=True))
    yield memory(
        "loss",
        0.0,
        activations=stem + sum(count * stays for count, stays in zip(run.counts, run.stays, strict=True)),
        logits=run.at(footprint.head) + run.at(footprint.head_extra),
        gathered=root + ((ahead[-1] if ahead else 0.0) if layout.reshard else gathered),
        communication=exchange,
    )
    head_gradients = profile.head_share * profile.gradient_bytes(run.root)
    for kind, remaining in run.places():
        before = sum(run.counts[each] * blocks[each] for each in range(kind))
        following = kind if remaining > 1 else kind - 1
        next_one = ahead[following] if following >= 0 else 0.0
        previous = kind if remaining < run.counts[kind] else kind + 1
        yield memory(
            "backward",
            run.trained_bytes(kind, remaining),
            head_gradients + profile.gradient_bytes(run.blocks[kind]),
            exchange + (reduced[previous] if previous < len(reduced) else 0.0),
            activations=run.live(kind, remaining),
            gathered=root + (blocks[kind] + next_one if layout.reshard else before + remaining * blocks[kind]),
        )
    root_gradients = profile.gradient_bytes(run.root)
    first = reduced[0] if reduced else 0.0
    done = size * trained - run.root.trainable_bytes
    meeting = (1.0 + 2.0 * profile.tied_share) * root_gradients  # two gradients of a tied parameter, and their sum
    yield memory("end of backward", done, meeting, first, activations=stem, gathered=root)
    yield memory("end of backward", done, root_gradients, profile.reduced_bytes(run.root))
    yield memory("optimizer step", size * trained, optimizer=here * (states + optimizer.step_extra * trained))
