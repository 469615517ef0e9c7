"""`choose_stage` in worlds of up to 1,024 processes: what always holds, and what is chosen where that is known."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accel_parallel.auto import (
    Hardware,
    Link,
    ModelProfile,
    OptimizerCost,
    TransformerSizes,
    transformer_profile,
)
from accel_parallel.auto.cost import predict_time
from accel_parallel.auto.layout import Layout, Workload
from accel_parallel.auto.links import Group
from accel_parallel.auto.memory import predict_memory
from accel_parallel.deepspeed.stage import StagePlan, choose_stage
from accel_parallel.deepspeed.stage_cost import exchanged_bytes, zero_time
from accel_parallel.deepspeed.stage_layout import ZeroLayout, ZeroSizes, zero_layouts
from accel_parallel.deepspeed.stage_memory import zero_memory
from accel_parallel.deepspeed.stage_search import stepping_costs
from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError

GIB = 2**30
ADAM = OptimizerCost(name="adamw", states=2, step_extra=1)

SMALL = TransformerSizes(hidden_size=768, num_layers=12, num_heads=12, vocab_size=50_304)
LLAMA_8B = TransformerSizes(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=128_256,
    intermediate_size=14_336,
    gated=True,
)


def hardware(memory_gib: float = 80, **changes: Any) -> Hardware:
    """A node of eight devices with fast links, of round figures."""
    made = Hardware(
        name="device",
        memory_bytes=int(memory_gib * GIB),
        flops_per_s={"float32": 60e12, "bfloat16": 1000e12, "float16": 1000e12},
        memory_bytes_per_s=3e12,
        devices_per_node=8,
        intra_node=Link(bytes_per_s=400e9, latency_s=2e-6),
        inter_node=Link(bytes_per_s=50e9, latency_s=8e-6),
        host=Link(bytes_per_s=50e9, latency_s=10e-6),
        host_memory_bytes=2000 * GIB,
    )
    return replace(made, **changes)


def choose(what: TransformerSizes | ModelProfile, world_size: int, memory_gib: float = 80, **run: Any) -> StagePlan:
    machine = hardware(memory_gib, **run.pop("machine", {}))
    precision = run.setdefault("precision", "bf16")
    profile = what if isinstance(what, ModelProfile) else transformer_profile(what, name="model", precision=precision)
    return choose_stage(
        profile, hardware=machine, world_size=world_size, **{"batch_size": 1, "sequence_length": 2048, **run}
    )


@st.composite
def profiles(draw: st.DrawFn) -> ModelProfile:
    heads = draw(st.sampled_from([4, 8, 16, 32, 64]))
    sizes = TransformerSizes(
        hidden_size=heads * draw(st.sampled_from([32, 64, 128])),
        num_layers=draw(st.integers(1, 80)),
        num_heads=heads,
        vocab_size=draw(st.integers(1_000, 200_000)),
        gated=draw(st.booleans()),
        tied=draw(st.booleans()),
    )
    precision: MixedPrecision = draw(st.sampled_from(["no", "bf16", "fp16"]))
    return transformer_profile(sizes, precision=precision)


buffers = st.builds(
    ZeroSizes,
    reduce_bucket_size=st.integers(1_000, 1_000_000_000),
    stage3_prefetch_bucket_size=st.integers(0, 100_000_000),
    stage3_max_live_parameters=st.integers(0, 2_000_000_000),
    stage3_max_reuse_distance=st.integers(0, 2_000_000_000),
    sub_group_size=st.integers(1_000_000, 1_000_000_000),
)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "world_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16, 64, 256, 1024])),
        "batch_size": draw(st.integers(1, 16)),
        "sequence_length": draw(st.sampled_from([128, 1000, 4096])),
        "num_steps": draw(st.sampled_from([1, 4])),
        "optimizer": draw(st.sampled_from(["adamw", "sgd", "adafactor", "adamw8bit"])),
        "allow_offload": draw(st.booleans()),
        "checkpointing": draw(st.booleans()),
        "sizes": draw(buffers),
    }


def attempt(profile: ModelProfile, machine: Hardware, run: dict[str, Any], **changes: Any) -> StagePlan | None:
    try:
        return choose_stage(profile, hardware=machine, precision=profile.precision, **{**run, **changes})
    except ConfigError as error:
        assert "No plan fits" in str(error)  # noqa: PT017 - a plan is the other outcome
        return None


slow = settings(deadline=None, max_examples=60)
memories = st.floats(0.5, 200)


@slow
@given(profiles(), runs(), memories, st.floats(0, 0.5), st.integers(1, 2000))
def test_a_plan_never_needs_more_than_there_is(
    profile: ModelProfile, run: dict[str, Any], memory_gib: float, reserve: float, host_gib: int
) -> None:
    machine = hardware(memory_gib, host_memory_bytes=host_gib * GIB)
    found = attempt(profile, machine, run, reserve=reserve)
    if found is None:
        return
    memory = found.plan.chosen.memory
    assert memory.total <= machine.memory_bytes * (1 - reserve)
    assert memory.host_bytes * min(run["world_size"], 8) <= machine.host_memory_bytes
    assert run["allow_offload"] or (found.offload_optimizer, found.offload_param) == ("none", "none")
    assert all(size >= 0 for _, size in memory.parts())
    assert all(part >= 0 for _, part in found.plan.chosen.time.parts())


@slow
@given(profiles(), runs(), memories, st.floats(1, 4))
def test_more_memory_gives_neither_a_higher_stage_nor_a_slower_one(
    profile: ModelProfile, run: dict[str, Any], memory_gib: float, times: float
) -> None:
    before = attempt(profile, hardware(memory_gib), run)
    after = attempt(profile, hardware(memory_gib * times), run)
    if before is None:
        return
    assert after is not None
    assert after.plan.chosen.time.per_sample_s <= before.plan.chosen.time.per_sample_s
    first, second = (
        (found.offload_param == "cpu", found.offload_optimizer == "cpu", found.stage) for found in (after, before)
    )
    assert first <= second
    if before.offload_optimizer == after.offload_optimizer:
        assert after.stage <= before.stage


@slow
@given(profiles(), runs(), memories)
def test_the_same_question_has_the_same_answer(profile: ModelProfile, run: dict[str, Any], memory_gib: float) -> None:
    first, second = (attempt(profile, hardware(memory_gib), run) for _ in range(2))
    assert first == second
    if first is not None:
        assert second is not None
        assert first.explain() == second.explain()
        assert first.plan.chosen == min((each for each in first.plan.candidates if each.fits), key=lambda c: c.rank)


@slow
@given(profiles(), runs(), buffers)
def test_what_is_held_between_steps_falls_from_stage_to_stage(
    profile: ModelProfile, run: dict[str, Any], sizes: ZeroSizes
) -> None:
    work = Workload(batch_size=run["batch_size"], sequence_length=run["sequence_length"])
    more, fewer = (
        [
            zero_memory(profile, layout, work, OptimizerCost(name="adamw", states=2), sizes)
            for layout in zero_layouts(world_size=world_size, offload=True)
        ]
        for world_size in (4, 32)
    )
    for one, other in zip(more, fewer, strict=True):
        assert other.total <= one.total  # more ranks never need more of a device
        assert other.host_bytes <= one.host_bytes
    states = [memory.optimizer + memory.parameters for memory in more[1:4]]
    assert states == sorted(states, reverse=True)


# The same model as of the native strategies


@slow
@given(profiles(), runs(), st.sampled_from([1, 2, 8, 64]))
def test_stage_0_is_ddp_that_hides_nothing(profile: ModelProfile, run: dict[str, Any], world_size: int) -> None:
    """In float32, where both keep the same: time differs by what travels, memory by what is exchanged at once."""
    profile = replace(profile, precision="no", whole=profile.sharded)
    work = Workload(
        batch_size=run["batch_size"], sequence_length=run["sequence_length"], accumulation_steps=run["num_steps"]
    )
    strategy: Any = "single" if world_size == 1 else "ddp"
    ddp = Layout(strategy=strategy, replicate=world_size, checkpointing=run["checkpointing"])
    zero = ZeroLayout.of(0, world_size=world_size, checkpointing=run["checkpointing"])
    theirs = zero_time(profile, zero, work, ADAM, hardware(), ZeroSizes())
    ours = predict_time(profile, ddp, work, ADAM, hardware())
    assert theirs.samples == ours.samples
    assert theirs.total_s - theirs.reduce_s - theirs.copy_s == pytest.approx(ours.total_s - ours.reduce_s)
    size_bytes = float(profile.trainable_bytes)
    buckets = max(1, -(-profile.num_trainable // 500_000_000))
    assert theirs.reduce_s == buckets * Group(size=world_size, hardware=hardware()).reduce_s(size_bytes / buckets)
    native, held = predict_memory(profile, ddp, work, ADAM), zero_memory(profile, zero, work, ADAM, ZeroSizes())
    assert held.total >= native.total - native.buckets - 1


@slow
@given(profiles(), runs(), st.sampled_from([2, 4, 8, 64, 512]))
def test_copies_and_parts_come_in_the_same_order(profile: ModelProfile, run: dict[str, Any], world_size: int) -> None:
    """Where nothing hides communication, DDP is faster than full sharding, and so is stage 0 than stage 3.

    In float32, since under mixed precision DDP exchanges that, and stage 0 the lower one.
    """
    profile = replace(profile, precision="no", whole=profile.sharded)
    work = Workload(
        batch_size=run["batch_size"], sequence_length=run["sequence_length"], accumulation_steps=run["num_steps"]
    )
    at_once: dict[str, Any] = {
        "flops_per_s": {"float32": 1e30},
        "memory_bytes_per_s": 1e30,
        "intra_node": Link(bytes_per_s=1e9, latency_s=0.0),
        "inter_node": Link(bytes_per_s=1e9, latency_s=0.0),
    }
    machine = hardware(**at_once)
    native = [Layout(strategy="ddp", replicate=world_size), Layout(strategy="fsdp", shard=world_size, reshard=True)]
    zero = [ZeroLayout.of(stage, world_size=world_size) for stage in (0, 3)]
    ddp, fsdp = (predict_time(profile, each, work, ADAM, machine).per_sample_s for each in native)
    stage_0, stage_3 = (zero_time(profile, each, work, ADAM, machine, TINY).per_sample_s for each in zero)
    assert ddp < fsdp
    assert stage_0 < stage_3


TINY = ZeroSizes(reduce_bucket_size=1_000, stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=0)


# Where the answer is known


def states_of(layout: ZeroLayout, precision: MixedPrecision) -> float:
    """Bytes a parameter, without activations and buffers of DeepSpeed, in backward."""
    profile = transformer_profile(SMALL, precision=precision)
    found = zero_memory(profile, layout, Workload(batch_size=1), OptimizerCost(name="adamw", states=2), TINY)
    return (found.parameters + found.optimizer) / profile.num_parameters


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "no", 4 + 8),
        (0, "bf16", 2 + 4 + 8),
        (1, "no", 4 + (4 + 8) / 8),
        (1, "bf16", 2 + 12 / 8),
        (2, "fp16", 2 + 12 / 8),
        (3, "no", (4 + 4 + 8) / 8),
        (3, "bf16", (2 + 4 + 8) / 8),
    ],
)
def test_bytes_a_parameter(stage: int, precision: MixedPrecision, expected: float) -> None:
    assert states_of(ZeroLayout.of(stage, world_size=8), precision) == pytest.approx(expected)


def test_bytes_a_parameter_on_the_host() -> None:
    profile = transformer_profile(SMALL, precision="bf16")
    adam = OptimizerCost(name="adamw", states=2)
    for stage, params, device, host in ((1, False, 2, 18), (2, False, 2, 20), (3, False, 2 / 8, 18), (3, True, 0, 20)):
        layout = ZeroLayout.of(stage, world_size=8, optimizer=True, params=params)
        found = zero_memory(profile, layout, Workload(batch_size=1), adam, TINY)
        assert found.optimizer == 0
        assert found.parameters == pytest.approx(device * profile.num_parameters)
        largest = 2 * SMALL.vocab_size * SMALL.hidden_size if stage < 3 else 0  # a gradient between device and host
        assert found.host_bytes == pytest.approx(host / 8 * profile.num_parameters + largest, rel=0.01)


PROFILE = transformer_profile(SMALL, name="model", precision="bf16")
PARAMETERS = PROFILE.num_parameters


@pytest.mark.parametrize(
    ("stage", "num_steps", "expected"),
    [
        (0, 4, {"all_reduce": 1}),
        (1, 4, {"all_reduce": 1, "all_gather": 1}),
        (2, 4, {"all_reduce": 4, "all_gather": 1}),
        (3, 4, {"all_gather": 8, "reduce_scatter": 4}),
    ],
)
def test_what_travels(stage: int, num_steps: int, expected: dict[str, int]) -> None:
    work = Workload(batch_size=1, accumulation_steps=num_steps)
    layout = ZeroLayout.of(stage, world_size=8)
    found = exchanged_bytes(PROFILE, layout, work, ADAM, TINY)
    assert found == {name: times * 2.0 * PARAMETERS for name, times in expected.items()}
    assert exchanged_bytes(PROFILE, ZeroLayout.of(stage, world_size=1), work, ADAM, TINY) == {}


def test_what_stays_gathered_travels_once() -> None:
    work, layout = Workload(batch_size=1), ZeroLayout.of(3, world_size=8)
    found = exchanged_bytes(PROFILE, layout, work, ADAM, ZeroSizes())
    assert found["all_gather"] == 2.0 * PARAMETERS


def test_the_time_of_what_travels() -> None:
    machine = hardware()
    work = Workload(batch_size=1, sequence_length=1024, accumulation_steps=3)
    sizes = ZeroSizes(reduce_bucket_size=10**7)
    zero, one, two, three = (
        zero_time(PROFILE, ZeroLayout.of(stage, world_size=64), work, ADAM, machine, sizes) for stage in range(4)
    )
    group = Group(size=64, hardware=machine)
    assert zero.reduce_s == pytest.approx(group.reduce_s(2.0 * PARAMETERS))
    buckets = -(-PARAMETERS // 10**7)
    assert one.reduce_s == pytest.approx(buckets * group.reduce_s(2.0 * PARAMETERS / buckets))
    assert two.reduce_s == pytest.approx(3 * one.reduce_s)
    assert zero.gather_s == 0.0
    assert one.gather_s == two.gather_s == pytest.approx(group.gather_s(2.0 * PARAMETERS))
    assert three.reduce_s == 0.0
    assert three.overhead_s == pytest.approx(0.03 * three.compute_s)
    assert zero.compute_s == one.compute_s == two.compute_s == three.compute_s
    assert one.optimizer_s == pytest.approx(zero.optimizer_s / 64)
    # A weight, its gradient and two averages in float32, the copies of two of them in 16 bits, and one temporary.
    assert zero.optimizer_s == pytest.approx((3 * 4 + 2 * 8 + 2 * 4 + 2 * (4 + 2)) * PARAMETERS / 3e12)


def test_the_time_of_offload() -> None:
    machine = hardware(host=Link(bytes_per_s=1e9, latency_s=0.0))
    work = Workload(batch_size=1, sequence_length=1024, accumulation_steps=3)

    def time_of(stage: int, *, optimizer: bool = True, params: bool = False) -> Any:
        layout = ZeroLayout.of(stage, world_size=8, optimizer=optimizer, params=params)
        return zero_time(PROFILE, layout, work, ADAM, machine, ZeroSizes())

    part = 2.0 * PARAMETERS / 8 / 1e9
    assert time_of(1).offload_s == pytest.approx(2 * part)  # once a window there, once back
    assert time_of(2).offload_s == pytest.approx(4 * part)
    assert 3 * part < time_of(3).offload_s < 4 * part  # behind backward, as far as that goes
    assert 8 * part < time_of(3, params=True).offload_s < 10 * part
    moved = (3 * 4 + 2 * 8 + 2 * 4 + 2 * (4 + 2)) * PARAMETERS
    assert time_of(1).optimizer_s == pytest.approx(moved / 100e9)  # of eight processes, an eighth each
    assert time_of(1, optimizer=False).offload_s == 0.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buckets_are_made_whole(stage: int) -> None:
    layout = ZeroLayout.of(stage, world_size=8)
    small, large = (
        zero_memory(
            PROFILE, layout, Workload(batch_size=1), OptimizerCost(name="sgd"), ZeroSizes(reduce_bucket_size=size)
        )
        for size in (10**9, 2 * 10**9)
    )
    assert large.total - small.total == (2 * 10**9 if stage else 0)


def test_windows_hold_their_gradients() -> None:
    cost = OptimizerCost(name="sgd")
    sizes = ZeroSizes(reduce_bucket_size=10**8)

    def held(stage: int, num_steps: int) -> float:
        work = Workload(batch_size=1, sequence_length=4096, accumulation_steps=num_steps)
        memory = zero_memory(PROFILE, ZeroLayout.of(stage, world_size=8), work, cost, sizes)
        assert memory.moment == "loss"
        return memory.gradients

    root = 2.0 * PROFILE.root.numel * PROFILE.head_share
    assert held(0, 1) == held(1, 1) == held(2, 1) == root
    assert held(0, 2) == held(1, 2) == 2.0 * PARAMETERS + root
    assert held(2, 2) == pytest.approx(2.0 * PARAMETERS / 8 + root)
    assert held(3, 1) == held(3, 2) == pytest.approx(2.0 * PARAMETERS / 8 + root)


def test_gathered_parameters_are_limited() -> None:
    profile = transformer_profile(LLAMA_8B, precision="bf16")
    work = Workload(batch_size=1, sequence_length=4096)

    def gathered(world_size: int = 8, **sizes: int) -> float:
        layout = ZeroLayout.of(3, world_size=world_size)
        return round(zero_memory(profile, layout, work, ADAM, ZeroSizes(**sizes)).gathered / 2.0)

    embedding = 128_256 * 4096 + 4096  # and a norm
    assert gathered() == 10**9 + embedding
    assert gathered(stage3_max_live_parameters=2 * 10**9) == 2 * 10**9 + embedding
    assert gathered(stage3_max_live_parameters=0, stage3_max_reuse_distance=10**8) == 5 * 10**7 + embedding
    assert gathered(stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=0) == embedding
    assert gathered(stage3_max_live_parameters=10**11) == profile.num_parameters
    assert gathered(world_size=1) == 0.0


def test_stage_3_steps_by_groups() -> None:
    cost, work = OptimizerCost(name="adamw", states=2, step_extra=2), Workload(batch_size=1)

    def at_step(sub_group_size: int) -> float:
        sizes = replace(TINY, sub_group_size=sub_group_size)
        found = zero_memory(PROFILE, ZeroLayout.of(3, world_size=2), work, cost, sizes)
        assert found.moment == "optimizer step"
        return found.total

    assert at_step(10**9) - at_step(6 * 10**7) == pytest.approx(12 * (PARAMETERS / 2 - 6 * 10**7), rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("precision", "expected"), [("no", 8), ("bf16", 2 + 2 + 4)])
def test_gradients_become_one_tensor_before_a_step(stage: int, precision: MixedPrecision, expected: int) -> None:
    """One that keeps nothing, so that this takes most: as they came, as one, and in 16 bits once more in float32."""
    profile = transformer_profile(SMALL, precision=precision)
    layout = ZeroLayout.of(stage, world_size=1)
    found = zero_memory(profile, layout, Workload(batch_size=1), OptimizerCost(name="sgd"), TINY)
    assert found.moment == ("exchange" if (stage, precision) == (1, "no") else "optimizer step")
    assert found.gradients == pytest.approx(expected * profile.num_parameters, rel=1e-4)


@pytest.mark.parametrize(
    ("memory_gib", "stage", "optimizer", "params"),
    [(200, 0, "none", "none"), (40, 3, "none", "none"), (30, 3, "cpu", "none"), (22, 3, "cpu", "cpu")],
)
def test_less_memory_divides_more_and_then_offloads(memory_gib: float, stage: int, optimizer: str, params: str) -> None:
    slow = {"intra_node": Link(bytes_per_s=20e9, latency_s=2e-6)}
    found = choose(LLAMA_8B, 8, memory_gib / 0.9, machine=slow)
    assert (found.stage, found.offload_optimizer, found.offload_param) == (stage, optimizer, params)


def test_one_process_offloads_what_does_not_fit() -> None:
    found = choose(LLAMA_8B, 1)
    assert (found.stage, found.offload_optimizer) == (1, "cpu")
    with pytest.raises(ConfigError, match="let parameters be offloaded"):
        choose(LLAMA_8B, 1, allow_offload=False)


def test_one_process_divides_nothing() -> None:
    found = choose(SMALL, 1, sizes=ZeroSizes(reduce_bucket_size=10**9))
    assert (found.stage, found.offload_optimizer) == (0, "none")


def test_what_saves_nothing_is_left_out() -> None:
    found = choose(SMALL, 8)
    assert 3 not in {each.layout.stage for each in found.plan.candidates if not each.layout.offload}  # type: ignore[attr-defined]
    assert any("zero 3 is left out, as it saves nothing" in reason for reason in found.reasons)


def test_whole_gradients_travel_once_a_window() -> None:
    slow = {"intra_node": Link(bytes_per_s=5e9, latency_s=2e-6)}
    found = choose(LLAMA_8B, 8, 80, machine=slow, num_steps=8)
    assert found.stage == 1


def test_what_is_settled_stays() -> None:
    found = choose(SMALL, 8, offload_optimizer="cpu")
    assert found.stage >= 1
    assert {each.layout.optimizer_on_host for each in found.plan.candidates} == {True}  # type: ignore[attr-defined]
    found = choose(LLAMA_8B, 8, 36, offload_param="none", offload_optimizer="cpu")
    assert found.offload_param == "none"
    found = choose(SMALL, 8, offload_optimizer="none", offload_param="cpu")
    assert (found.stage, found.offload_optimizer, found.offload_param) == (3, "none", "cpu")
    found = choose(SMALL, 8, allow_offload=False, offload_param="cpu")
    assert (found.stage, found.offload_optimizer, found.offload_param) == (3, "none", "cpu")


def test_candidates_come_in_order() -> None:
    found = list(zero_layouts(world_size=2, offload=True))
    assert found == sorted(found, key=lambda each: each.simplicity)
    assert [str(each) for each in found] == [
        "zero 0", "zero 1", "zero 2", "zero 3", "zero 1, optimizer on host", "zero 2, optimizer on host",
        "zero 3, optimizer on host", "zero 3, optimizer and params on host",
    ]  # fmt: skip


def test_a_cpu_steps_over_flat_tensors_one_by_one() -> None:
    slow = {"host": None, "steps_at_once": False}
    found = choose(SMALL, 2, 16, sequence_length=1, machine=slow, sizes=TINY)
    by_stage = {each.layout.stage: each.memory for each in found.plan.candidates}  # type: ignore[attr-defined]
    work = Workload(batch_size=1)
    for stage, extra in ((0, 0), (1, 2)):
        cost = OptimizerCost(name="adamw", states=2, step_extra=extra)
        assert by_stage[stage] == zero_memory(PROFILE, ZeroLayout.of(stage, world_size=2), work, cost, TINY)


def test_a_device_in_host_memory_offloads_nothing() -> None:
    cpu: dict[str, Any] = {"machine": {"host": None, "host_memory_bytes": 0, "steps_at_once": False}}
    found = choose(SMALL, 4, 16, **cpu)
    assert (found.offload_optimizer, found.offload_param) == ("none", "none")
    settled = choose(SMALL, 4, 16, offload_optimizer="cpu", **cpu)
    assert settled.plan.chosen.memory.host_bytes == 0
    assert settled.plan.chosen.memory.optimizer > found.plan.chosen.memory.optimizer
    assert settled.plan.chosen.time.offload_s == 0


def test_1024_processes_take_less_than_a_second() -> None:
    start = time.perf_counter()
    found = choose(LLAMA_8B, 1024)
    assert time.perf_counter() - start < 1.0
    assert len(found.plan.candidates) >= 3


def test_choosing_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from accel_parallel.auto import Hardware, Link, TransformerSizes, transformer_profile\n"
        "from accel_parallel.deepspeed.stage import choose_stage\n"
        "sizes = TransformerSizes(hidden_size=64, num_layers=2, num_heads=2, vocab_size=100)\n"
        "link = Link(bytes_per_s=1e9, latency_s=1e-6)\n"
        "machine = Hardware(name='d', memory_bytes=2**33, flops_per_s={'float32': 1e12}, memory_bytes_per_s=1e11,\n"
        "                   intra_node=link, inter_node=link, devices_per_node=2)\n"
        "run = {'hardware': machine, 'world_size': 4, 'precision': 'no', 'batch_size': 2}\n"
        "found = choose_stage(transformer_profile(sizes), **run)\n"
        "print(found.explain())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_explain_shows_the_candidates_and_why() -> None:
    found = choose(LLAMA_8B, 8, sizes=ZeroSizes(reduce_bucket_size=10**8))
    text = found.explain()
    table = text.split("\n\n")[1].splitlines()
    assert table[0].split() == ["plan", "memory", "fits", "step", "samples/s", "compute", "exchange", "host", "other"]
    assert sum(line.startswith("* zero 3 ") for line in table) == 1
    for words in (
        "zero 3, optimizer and params on host", "zero 3 is the fastest of", "zero 0 does not fit: ",
        "zero 1 fits, but is predicted", "memory of a process", "a step: compute", "assumed:",
        "reduce_bucket_size=100,000,000",
    ):  # fmt: skip
        assert words in text, words


# Optimizers


@pytest.mark.parametrize(
    ("optimizer", "at_once", "extras"),
    [
        ("adamw", True, (1, 1, 2)),
        ("adamw", False, (0, 2, 2)),
        (OptimizerCost(name="own", states=3, step_extra=0), False, (0, 0, 0)),
    ],
)
def test_temporaries_of_flat_steps(optimizer: Any, at_once: bool, extras: tuple[float, ...]) -> None:
    assert tuple(each.step_extra for each in stepping_costs(optimizer, hardware(steps_at_once=at_once))) == extras


def test_temporaries_of_optimizers_as_they_are() -> None:
    weights = [nn.Parameter(torch.zeros(1))]

    def extras(optimizer: Any) -> tuple[float, ...]:
        return tuple(each.step_extra for each in stepping_costs(optimizer, hardware()))

    assert extras(torch.optim.AdamW(weights)) == (1, 1, 2)
    assert extras(torch.optim.AdamW(weights, foreach=False)) == (0, 2, 2)
    assert extras(torch.optim.AdamW(weights, fused=True)) == (0, 0, 0)
    compiled = type("DeepSpeedCPUAdam", (torch.optim.Adam,), {})(weights)
    assert extras(compiled) == (0, 0, 0)
    assert stepping_costs(compiled, hardware())[0].states == 2
    with pytest.raises(ConfigError, match="`optimizer='Own'` is not known"):
        stepping_costs(type("Own", (torch.optim.Adam,), {})(weights), hardware())


# Models


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def ask(model: nn.Module, **run: Any) -> StagePlan:
    return choose_stage(model, **{"hardware": hardware(1), "world_size": 2, "precision": "no", **run})


LITTLE = ZeroSizes(reduce_bucket_size=1000)


def test_a_model_is_measured_where_it_is_known_what_it_is_given() -> None:
    found = ask(Mixer(), example_inputs=torch.zeros(3, 64), batch_size=3, sizes=LITTLE)
    chosen = found.plan.chosen
    assert chosen.time.compute_s > 0
    assert chosen.time.samples == 6
    assert found.plan.limit_bytes == int(0.9 * GIB)
    assert "nothing says" not in found.explain()


def test_without_inputs_states_count_and_half_is_left() -> None:
    model = Mixer()
    found = ask(model, sizes=LITTLE)
    assert found.plan.limit_bytes == GIB // 2
    assert found.plan.chosen.memory.activations == 0
    assert "assumed: nothing says what the model is given, so activations and computation count as nothing" in (
        found.explain()
    )
    states = sum(parameter.numel() for parameter in model.parameters()) * 16
    assert states <= max(each.memory.total for each in found.plan.candidates) < 1.5 * states
    assert ask(model, sizes=LITTLE, reserve=0.2).plan.limit_bytes == int(0.8 * GIB)
    with pytest.raises(ConfigError, match="No plan fits `Mixer`"):
        ask(model, hardware=hardware(0.0001))


def test_half_of_a_host_is_not_left() -> None:
    model = Mixer()
    machine = hardware(0.00045, host_memory_bytes=600_000)
    found = ask(model, hardware=machine, sizes=LITTLE)
    assert found.offload_optimizer == "cpu"
    assert found.plan.chosen.memory.host_bytes * 2 > 0.5 * 600_000


def test_a_model_that_is_divided_already_is_refused() -> None:
    model = Mixer()
    model.head.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"was divided while it was built, .* Set `zero_stage=3`"):
        ask(model)


# Bad input


def test_what_would_help_is_said_and_is_enough() -> None:
    machine = {"host": None}
    run: dict[str, Any] = {"sequence_length": 8192, "machine": machine}
    with pytest.raises(ConfigError, match="No plan fits `model` with `batch_size=1` of 8,192 tokens") as caught:
        choose(LLAMA_8B, 16, 40, **run)
    text = str(caught.value)
    assert "Computing blocks a second time in backward" in text
    choose(LLAMA_8B, 16, 40, **run, checkpointing=True)
    with pytest.raises(ConfigError, match=r"launch [0-9]+ devices") as caught:
        choose(LLAMA_8B, 2, 40, machine=machine)
    devices = int(str(caught.value).split("launch ")[1].split(" ")[0])
    choose(LLAMA_8B, devices, 40, machine=machine)
    with pytest.raises(ConfigError, match="No plan fits"):
        choose(LLAMA_8B, devices - 1, 40, machine=machine)


def test_smaller_buffers_are_proposed_where_they_are_enough() -> None:
    sizes = ZeroSizes(reduce_bucket_size=4 * 10**9)
    with pytest.raises(ConfigError, match="So would smaller buffers of DeepSpeed: `reduce_bucket_size=5") as caught:
        choose(SMALL, 8, 4, sizes=sizes, machine={"host": None})
    assert "sub_group_size" in str(caught.value)
    assert choose(SMALL, 8, 4, sizes=ZeroSizes(reduce_bucket_size=50_000_000), machine={"host": None}).stage <= 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"world_size": 0}, "`world_size=0` leaves no process"),
        ({"batch_size": 0}, "`batch_size=0` leaves nothing to train on"),
        ({"batch_size": None}, "Give `batch_size`, such as that of the loader"),
        ({"num_steps": 0}, "`accumulation_steps=0` leaves nothing"),
        ({"reserve": 1.0}, "`reserve=1.0` is no part"),
        ({"optimizer": "adamv"}, "`optimizer='adamv'` is not known.* mean"),
        ({"precision": "fp16"}, "`precision='fp16'` and a profile of model for precision"),
        ({"offload_param": "nvme"}, "`offload_param` is settled to be 'nvme'"),
        ({"example_inputs": torch.zeros(1)}, "`example_inputs` and `loss` have no effect"),
    ],
)
def test_impossible_questions_are_refused(changes: dict[str, Any], match: str) -> None:
    run: dict[str, Any] = {"world_size": 2, "batch_size": 1, "precision": "bf16", **changes}
    with pytest.raises(ConfigError, match=match):
        choose_stage(PROFILE, hardware=hardware(), **run)


def test_a_length_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="`sequence_length=128` has no effect"):
        choose(replace(PROFILE, sequence_length=None), 2, sequence_length=128)


def test_buffers_are_read_from_a_section() -> None:
    section = {"reduce_bucket_size": 5e7, "stage3_prefetch_bucket_size": "auto", "stage": 3, "sub_group_size": 10**8}
    assert ZeroSizes.of(section) == ZeroSizes(reduce_bucket_size=5 * 10**7, sub_group_size=10**8)
    assert ZeroSizes.of(section, hidden_size=100).stage3_prefetch_bucket_size == 9000
    with pytest.raises(ConfigError, match="reduce_bucket_size` is 0, which is no number of elements"):
        ZeroSizes.of({"reduce_bucket_size": 0})
    with pytest.raises(ConfigError, match=r"sub_group_size` is 1\.5"):
        ZeroSizes.of({"sub_group_size": 1.5})
