"""How much memory a rank needs under each stage of ZeRO, as DeepSpeed 0.19 divides and buffers. Pure.

Activations are those of `auto.memory`, of a model that is in its computing dtype as a whole. Of T trained elements, of
b bytes in that dtype, each of n ranks holds (Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 5; what DeepSpeed
adds to that was read in its source and measured, by `integration-tests/deepspeed/test_stage.py`):

* **stage 0**: weights, gradients, optimizer states, and in 16 bits a copy of the weights in float32, all whole;
  gradients once more, up to 5e8 of them, while they are exchanged, and in float32 while the optimizer steps.
* **stages 1 and 2**: weights whole; a copy of its part in float32 even of weights that are float32 already; states of
  that part. A bucket at full size through backward, and what is exchanged of it once more. At stage 1 gradients are
  whole until a window ends; at stage 2 they go block by block, but for the rank's part, which a window has twice.
* **stage 3**: a part of weights, copy, states and gradients, all of it through the whole step, and the bucket. Gathered
  parameters on top: those that were gathered ahead or are used again soon, and the current ones.
* **the step** is one over flat tensors, so that its temporaries have the size of the rank's part, in float32.
* **offload** (Ren et al., "ZeRO-Offload", arXiv:2101.06840; "ZeRO-Infinity", arXiv:2104.07857): copy, states,
  gradients of the part and the step are on the host, at stages 1 and 2 with a buffer for the weights that come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from accel_parallel.auto.layout import Workload
from accel_parallel.auto.memory import Memory, Sizes
from accel_parallel.auto.optimizers import OptimizerCost
from accel_parallel.auto.profile import ModelProfile
from accel_parallel.deepspeed.stage_layout import ZeroLayout, ZeroSizes

__all__ = ["WHOLE_EXCHANGE", "Parts", "zero_memory"]

WHOLE_EXCHANGE = 500_000_000
"""Elements of gradients that stage 0 exchanges at once."""


def zero_memory(
    profile: ModelProfile, layout: ZeroLayout, work: Workload, optimizer: OptimizerCost, sizes: ZeroSizes
) -> Memory:
    """The most that one rank needs at once in a training step, in parts, and what it needs of its host."""
    rank = _Rank(profile, layout, work, optimizer, sizes)
    moments = rank.whole_gradients() if layout.stage < 2 else rank.divided_gradients()
    return max(moments, key=lambda memory: memory.total)


class Parts:
    """Bytes of a model's states, and what of them is where."""

    def __init__(self, profile: ModelProfile, layout: ZeroLayout, optimizer: OptimizerCost) -> None:
        units = [(1, profile.root), *((kind.count, kind.weights) for kind in profile.blocks)]
        self.layout = layout
        self.ranks = layout.shard if layout.stage else 1
        """Over how many optimizer states are divided."""
        self.weights = sum(count * profile.gathered_bytes(each) for count, each in units)
        self.gradients = sum(count * profile.gradient_bytes(each) for count, each in units)
        self.numel = profile.num_parameters
        self.trained = profile.num_trainable
        self.element = self.weights / max(1, self.numel)
        """Bytes of a weight as it is computed with."""
        self.masters = 4.0 * self.trained if layout.stage or profile.is_mixed else 0.0
        """A copy of the trained weights in float32."""
        self.stepped = self.masters or self.gradients
        """What the optimizer steps over: the copy, or the weights themselves."""
        self.states = optimizer.kept_bytes(numel=self.trained, size_bytes=self.stepped)
        self.step_extra = optimizer.step_extra * self.stepped
        head = profile.head_share * profile.root.numel
        self.largest_block = max((kind.weights.numel for kind in profile.blocks), default=profile.root.numel)
        self.largest = max(head, profile.root.numel - head, self.largest_block)
        """Elements that no parameter and no module with parameters of its own exceeds."""

    @property
    def kept_for_step(self) -> float:
        """Weights in float32 and optimizer states of one rank."""
        return (self.masters + self.states) / self.ranks

    @property
    def host_bytes(self) -> float:
        """All that is in host memory for one rank."""
        layout, size, part = self.layout, 0.0, self.element * self.trained / self.ranks
        if layout.optimizer_on_host:
            size = self.kept_for_step + (self.masters + self.step_extra) / self.ranks  # gradients and temporaries
            size += part if layout.stage > 1 else 0.0  # gradients as they come
            size += part + self.element * self.largest if layout.stage < 3 else 0.0  # weights on their way back
        return size + (self.weights / self.ranks if layout.params_on_host else 0.0)


class _Place(NamedTuple):
    """A moment of forward or backward."""

    moment: str
    done: float
    """Bytes of the gradients of all that backward has been through."""
    fresh: float
    """Of these, bytes that nothing was done with yet."""
    passed: float
    """Elements of the blocks that backward has been through."""
    activations: float
    logits: float = 0.0


class _Rank:
    """One candidate on one rank."""

    def __init__(
        self, profile: ModelProfile, layout: ZeroLayout, work: Workload, optimizer: OptimizerCost, sizes: ZeroSizes
    ) -> None:
        self.profile, self.layout, self.sizes = profile, layout, sizes
        self.run = Sizes(profile, layout, work)
        self.parts = parts = Parts(profile, layout, optimizer)
        self.has_earlier = work.accumulation_steps > 1
        element = parts.element
        self.bucket = element * sizes.reduce_bucket_size if layout.stage else 0.0
        at_once = self.bucket if layout.stage else element * WHOLE_EXCHANGE
        self.exchanged = min(parts.gradients, max(at_once, element * parts.largest))
        """Gradients once more, while they are exchanged."""
        self.mine = 0.0 if layout.optimizer_on_host else parts.gradients / parts.ranks
        """Gradients that this rank steps with, and has on the device."""
        self.in_flight = element * parts.largest if layout.optimizer_on_host and layout.stage < 3 else 0.0
        """A gradient between device and host."""

    def whole_gradients(self) -> Iterator[Memory]:
        """Stages 0 and 1: every rank has all gradients until a window ends."""
        parts = self.parts
        for place in self._places():
            is_all = self.has_earlier or place.moment == "end of backward"
            gradients = parts.gradients + place.fresh if is_all else place.done
            yield self._memory(place.moment, gradients, self.bucket, activations=place.activations, logits=place.logits)
        if self.layout.stage == 1:
            waiting = max(0.0, parts.gradients - self.bucket)  # the others are in the bucket already
            yield self._memory("exchange", waiting + self.mine, self.bucket + self.exchanged)
            yield from self._step()
            return
        yield self._memory("exchange", parts.gradients, self.exchanged)
        full = parts.gradients + parts.masters
        yield self._memory("optimizer step", full, optimizer=parts.kept_for_step + parts.step_extra)

    def divided_gradients(self) -> Iterator[Memory]:
        """Stages 2 and 3: gradients leave in buckets, but for this rank's part."""
        last = self.layout.stage == 3
        before = self.mine if last or self.has_earlier else 0.0
        for place in self._places():
            # Nothing is exchanged before the bucket is full, or one gradient is more than it holds.
            is_full = place.done > self.bucket or place.moment == "end of backward"
            added = self.mine if is_full and not last else 0.0
            gathered, unpacked = self._gathered(place.passed)
            yield self._memory(
                place.moment, before + added + place.fresh,
                self.bucket + (self.exchanged if is_full else 0.0) + unpacked, gathered=gathered,
                activations=place.activations, logits=place.logits,
            )  # fmt: skip
        yield from self._step()

    def _step(self) -> Iterator[Memory]:
        """Of stages 1 to 3: first its gradients become one tensor, and float32, then the optimizer has temporaries."""
        parts, last = self.parts, self.layout.stage == 3
        communication = self.bucket if last else 0.0
        if self.layout.optimizer_on_host:
            yield self._memory("optimizer step", 0.0, communication)
            return
        part = parts.trained / parts.ranks
        at_once = min(1.0, self.sizes.sub_group_size / part) if last and part else 1.0
        full, extra = (at_once * size / parts.ranks for size in (parts.masters, parts.step_extra))
        flat = at_once * self.mine + (full if self.profile.is_mixed else 0.0)
        kept = self.mine if last else 0.0  # at stage 3 in one buffer for good
        yield self._memory("optimizer step", self.mine + flat, communication)
        yield self._memory("optimizer step", kept + full, communication, optimizer=parts.kept_for_step + extra)

    def _gathered(self, passed: float) -> tuple[float, float]:
        """Parameters that are gathered at most, and what was gathered at once and is not unpacked yet."""
        parts, sizes = self.parts, self.sizes
        if self.layout.stage < 3 or parts.ranks == 1:
            return 0.0, 0.0
        numel = min(parts.numel - passed, sizes.gathered_ahead + parts.largest)
        at_once = min(parts.numel, max(sizes.stage3_prefetch_bucket_size, parts.largest_block))
        return parts.element * numel, parts.element * at_once

    def _memory(self, moment: str, gradients: float, communication: float = 0.0, **more: float) -> Memory:
        parts, layout = self.parts, self.layout
        weights = parts.weights if layout.stage < 3 else 0.0 if layout.params_on_host else parts.weights / parts.ranks
        return Memory(
            moment=moment, parameters=weights + self.profile.buffer_bytes, gradients=gradients + self.in_flight,
            communication=communication, host_bytes=parts.host_bytes,
            **{"optimizer": 0.0 if layout.optimizer_on_host else parts.kept_for_step, **more},
        )  # fmt: skip

    def _places(self) -> Iterator[_Place]:
        """Where backward may be worst, as of `auto.memory`, with the gradients of each."""
        run, profile = self.run, self.profile
        footprint, root = run.footprint, profile.gradient_bytes(profile.root)
        ratio = self.parts.gradients / max(1.0, run.total("trainable_bytes"))
        stem, head, tied = run.at(footprint.stem), profile.head_share * root, profile.tied_share * root
        live = stem + sum(count * stays for count, stays in zip(run.counts, run.stays, strict=True))
        yield _Place("loss", head, head, 0.0, live, run.at(footprint.head) + run.at(footprint.head_extra))
        for kind, remaining in run.places():
            block = profile.gradient_bytes(run.blocks[kind])
            later = sum(run.counts[each] * run.blocks[each].numel for each in run.kinds if each > kind)
            passed = later + (run.counts[kind] - remaining) * run.blocks[kind].numel
            done = head + ratio * run.trained_bytes(kind, remaining) + block
            # The gradient of a tied parameter waits for its other places.
            yield _Place("backward", done, block + tied, passed, run.live(kind, remaining))
        # There two gradients of it and their sum are there at once.
        blocks = sum(count * each.numel for count, each in zip(run.counts, run.blocks, strict=True))
        fresh = 2.0 * tied if self.layout.stage < 2 else root - head + 3.0 * tied
        yield _Place("end of backward", self.parts.gradients, fresh, blocks, stem)
