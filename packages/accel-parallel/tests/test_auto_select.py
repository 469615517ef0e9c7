"""`select_plan` in worlds of up to 1,024 processes: what always holds, and what is chosen where the answer is known."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_parallel.auto import (
    Hardware,
    Link,
    ModelProfile,
    OptimizerCost,
    Plan,
    TransformerSizes,
    select_plan,
    transformer_profile,
)
from accel_parallel.auto.layout import Layout, Workload, layouts
from accel_parallel.auto.memory import predict_memory
from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError

GIB = 2**30

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
LLAMA_70B = TransformerSizes(
    hidden_size=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    vocab_size=128_256,
    intermediate_size=28_672,
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


@st.composite
def profiles(draw: st.DrawFn) -> ModelProfile:
    heads = draw(st.sampled_from([4, 6, 8, 12, 16, 32, 64]))
    sizes = TransformerSizes(
        hidden_size=heads * draw(st.sampled_from([32, 64, 128])),
        num_layers=draw(st.integers(1, 80)),
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([size for size in (1, 2, 4, 8, heads) if heads % size == 0])),
        vocab_size=draw(st.integers(1_000, 200_000)),
        gated=draw(st.booleans()),
        tied=draw(st.booleans()),
        attention=draw(st.sampled_from(["fused", "eager"])),
        dropout=draw(st.booleans()),
    )
    precision: MixedPrecision = draw(st.sampled_from(["no", "bf16", "fp16"]))
    dtype = "bfloat16" if precision == "no" and draw(st.booleans()) else "float32"
    return transformer_profile(sizes, precision=precision, dtype=dtype)  # type: ignore[arg-type]


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "world_size": draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24, 64, 96, 256, 512, 1024])),
        "batch_size": draw(st.integers(1, 16)),
        "sequence_length": draw(st.sampled_from([128, 1000, 2048, 8192])),
        "gradient_accumulation_steps": draw(st.sampled_from([1, 4])),
        "optimizer": draw(st.sampled_from(["adamw", "sgd", "adafactor", "adamw8bit"])),
        "offload": draw(st.booleans()),
        "tensor_parallel": draw(st.booleans()),
    }


def attempt(profile: ModelProfile, machine: Hardware, run: dict[str, Any], **changes: Any) -> Plan | None:
    try:
        return select_plan(profile, machine, **{**run, **changes})
    except ConfigError as error:
        assert "No plan fits" in str(error)  # noqa: PT017 - a plan is the other outcome
        return None


slow = settings(deadline=None, max_examples=60)


@slow
@given(profiles(), runs(), st.floats(0.5, 200), st.floats(0, 0.5))
def test_a_plan_never_needs_more_than_the_device_has(
    profile: ModelProfile, run: dict[str, Any], memory_gib: float, reserve: float
) -> None:
    machine = hardware(memory_gib)
    plan = attempt(profile, machine, run, reserve=reserve)
    if plan is None:
        return
    memory = plan.chosen.memory
    assert memory.total <= machine.memory_bytes * (1 - reserve)
    assert memory.host_bytes * min(run["world_size"], 8) <= machine.host_memory_bytes * (1 - reserve)
    assert all(size >= 0 for _, size in memory.parts())
    assert all(part >= 0 for _, part in plan.chosen.time.parts())


@slow
@given(profiles(), runs(), st.floats(1, 100), st.floats(1, 4))
def test_more_memory_never_gives_a_slower_plan(
    profile: ModelProfile, run: dict[str, Any], memory_gib: float, times: float
) -> None:
    before = attempt(profile, hardware(memory_gib), run)
    after = attempt(profile, hardware(memory_gib * times), run)
    if before is None:
        return
    assert after is not None
    assert after.chosen.time.per_sample_s <= before.chosen.time.per_sample_s
    fitting = {each.layout for each in after.candidates if each.fits}
    assert {each.layout for each in before.candidates if each.fits} <= fitting


@slow
@given(profiles(), runs(), st.floats(1, 200))
def test_sizes_multiply_to_the_world_and_divide_what_they_have_to(
    profile: ModelProfile, run: dict[str, Any], memory_gib: float
) -> None:
    plan = attempt(profile, hardware(memory_gib), run)
    if plan is None:
        return
    layouts_seen = [each.layout for each in plan.candidates]
    assert len(set(layouts_seen)) == len(layouts_seen)
    for layout in layouts_seen:
        layout.parallelism().check_world(run["world_size"])
        assert min(run["world_size"], 8) % layout.tp == 0  # within a node
        assert layout.tp == 1 or layout.strategy == "fsdp"
        assert profile.num_heads is not None
        assert profile.num_kv_heads is not None
        assert profile.num_heads % layout.tp == profile.num_kv_heads % layout.tp == 0
        assert not layout.offload or run["offload"]
    plan.parallelism.check_world(run["world_size"])
    assert plan.samples_per_step % (run["batch_size"] * run["gradient_accumulation_steps"]) == 0


@pytest.mark.parametrize(("heads", "kv_heads", "sizes"), [(12, 6, [1, 2, 3, 6]), (32, 8, [1, 2, 4, 8]), (7, 7, [1, 7])])
def test_tensor_parallel_divides_heads_of_queries_and_of_keys(heads: int, kv_heads: int, sizes: list[int]) -> None:
    profile = replace(transformer_profile(SMALL), num_heads=heads, num_kv_heads=kv_heads, tp_sizes=tuple(range(2, 65)))
    world = 8 * 3 * 7
    found = {layout.tp for layout in layouts(profile, world_size=world, devices_per_node=world, offload=False)}
    assert sorted(found) == sizes
    a_node_less = {layout.tp for layout in layouts(profile, world_size=world, devices_per_node=1, offload=False)}
    assert a_node_less == {1}


@slow
@given(profiles(), runs(), st.floats(1, 200))
def test_the_same_question_has_the_same_answer(profile: ModelProfile, run: dict[str, Any], memory_gib: float) -> None:
    first, second = (attempt(profile, hardware(memory_gib), run) for _ in range(2))
    assert first == second
    if first is not None:
        assert second is not None
        assert first.explain() == second.explain()
        assert first.chosen == min((each for each in first.candidates if each.fits), key=lambda each: each.rank)


@slow
@given(profiles(), st.integers(0, 9), st.booleans(), st.booleans(), st.integers(1, 4))
def test_more_shards_never_need_more_memory(
    profile: ModelProfile, power: int, reshard: bool, checkpointing: bool, passes: int
) -> None:
    work = Workload(batch_size=2, sequence_length=512, accumulation_steps=passes)
    optimizer = OptimizerCost(name="adamw", states=2, step_extra=1)
    fewer, more = (
        predict_memory(
            profile,
            Layout(strategy="fsdp", shard=size, reshard=reshard, checkpointing=checkpointing),
            work,
            optimizer,
        )
        for size in (2 * 2**power, 4 * 2**power)
    )
    assert more.total <= fewer.total


@slow
@given(profiles(), runs())
def test_more_samples_and_tokens_never_need_less(profile: ModelProfile, run: dict[str, Any]) -> None:
    optimizer = OptimizerCost(name="adamw", states=2)
    for layout in layouts(profile, world_size=run["world_size"], devices_per_node=8, offload=True):
        batch, length = run["batch_size"], run["sequence_length"]
        least = predict_memory(profile, layout, Workload(batch_size=batch, sequence_length=length), optimizer)
        for more in (
            Workload(batch_size=batch + 1, sequence_length=length),
            Workload(batch_size=batch, sequence_length=length + 1),
        ):
            assert predict_memory(profile, layout, more, optimizer).total >= least.total


# Where the answer is known


def choose(sizes: TransformerSizes, world_size: int, **kwargs: Any) -> Plan:
    memory_gib = kwargs.pop("memory_gib", 80)
    machine = hardware(memory_gib, **kwargs.pop("machine", {}))
    profile = transformer_profile(sizes, name="model", precision="bf16")
    return select_plan(profile, machine, world_size=world_size, **{"batch_size": 1, "sequence_length": 4096, **kwargs})


def test_a_small_model_is_copied() -> None:
    plan = choose(SMALL, 8, batch_size=16, sequence_length=1024)
    assert (plan.strategy, plan.activation_checkpointing, plan.cpu_offload) == ("ddp", False, False)
    assert plan.reshard_after_forward is None
    assert plan.parallelism.dp_replicate_size == 8
    assert plan.fsdp_plugin() is None


def test_one_process_is_left_alone() -> None:
    plan = choose(SMALL, 1, sequence_length=1024)
    assert plan.strategy == "single"
    assert plan.parallelism.total_size == 1


def test_one_process_offloads_what_does_not_fit() -> None:
    plan = choose(LLAMA_8B, 1)
    assert (plan.strategy, plan.cpu_offload, plan.parallelism.total_size) == ("fsdp", True, 1)
    plugin = plan.fsdp_plugin()
    assert plugin is not None
    assert plugin.cpu_offload


def test_what_does_not_fit_in_copies_is_sharded() -> None:
    plan = choose(LLAMA_8B, 8)
    assert (plan.strategy, plan.parallelism.dp_shard_size, plan.cpu_offload) == ("fsdp", 8, False)
    assert any("ddp replicate=8 does not fit" in reason for reason in plan.reasons)


def test_less_memory_reshards_then_computes_again_then_offloads() -> None:
    seen = []
    for memory_gib in (80, 56, 40, 20):
        plan = choose(LLAMA_8B, 8, memory_gib=memory_gib, tensor_parallel=False)
        seen.append((plan.reshard_after_forward, plan.activation_checkpointing, plan.cpu_offload))
    assert seen == [(False, False, False), (True, False, False), (False, True, False), (True, True, True)]


def test_far_nodes_make_copies_of_shards() -> None:
    near, far = (
        choose(LLAMA_8B, 64, machine={"inter_node": Link(bytes_per_s=50e9, latency_s=latency_s)}, tensor_parallel=False)
        for latency_s in (1e-6, 1e-3)
    )
    assert (near.parallelism.dp_replicate_size, near.parallelism.dp_shard_size) == (1, 64)
    assert far.parallelism.dp_replicate_size > 1
    assert far.parallelism.dp_shard_size >= 8  # at least a node
    assert any("fsdp shard=64, keep gathered fits, but is predicted" in reason for reason in far.reasons)


def test_tensor_parallel_where_one_block_is_too_much() -> None:
    # Four billion parameters a block: gathered, gathered ahead, their gradients, and the buffer of the block before.
    huge = TransformerSizes(hidden_size=16_384, num_layers=8, num_heads=64, num_kv_heads=8, vocab_size=32_000)
    plan = choose(huge, 64, sequence_length=1024, memory_gib=30)
    assert 1 not in {each.layout.tp for each in plan.candidates if each.fits}
    assert plan.parallelism.tp_size > 1
    assert plan.samples_per_step == 64 // plan.parallelism.tp_size


def test_what_is_as_fast_and_less_simple_is_not_taken() -> None:
    # Links so slow that computing again hides as much communication as it takes time.
    slow_links = {"inter_node": Link(bytes_per_s=1e9, latency_s=50e-6)}
    plan = choose(LLAMA_8B, 64, machine=slow_links, tensor_parallel=False, batch_size=2, memory_gib=200)
    assert not plan.activation_checkpointing


def test_frozen_weights_take_no_states() -> None:
    profile = transformer_profile(LLAMA_8B, name="model", precision="bf16")
    frozen = replace(
        profile,
        root=replace(profile.root, trainable_numel=0, trainable_bytes=0),
        blocks=tuple(
            replace(kind, weights=replace(kind.weights, trainable_numel=1000, trainable_bytes=4000))
            for kind in profile.blocks
        ),
    )
    plan = select_plan(frozen, hardware(), world_size=8, batch_size=1, sequence_length=2048)
    assert plan.strategy == "ddp"
    assert plan.chosen.memory.optimizer < 0.001 * GIB


def test_1024_processes_take_less_than_a_second() -> None:
    start = time.perf_counter()
    plan = choose(LLAMA_70B, 1024)
    assert time.perf_counter() - start < 1.0
    assert len(plan.candidates) > 200


def test_choosing_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from accel_parallel.auto import Hardware, Link, TransformerSizes, select_plan, transformer_profile\n"
        "sizes = TransformerSizes(hidden_size=64, num_layers=2, num_heads=2, vocab_size=100)\n"
        "link = Link(bytes_per_s=1e9, latency_s=1e-6)\n"
        "machine = Hardware(name='d', memory_bytes=2**33, flops_per_s={'float32': 1e12}, memory_bytes_per_s=1e11,\n"
        "                   intra_node=link, inter_node=link, devices_per_node=2)\n"
        "plan = select_plan(transformer_profile(sizes), machine, world_size=4, batch_size=2)\n"
        "print(plan.explain())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_explain_shows_the_candidates_and_why() -> None:
    text = choose(LLAMA_8B, 8).explain(limit=4)
    table = text.split("\n\n")[1].splitlines()
    assert table[0].split() == ["plan", "memory", "fits", "step", "samples/s", "compute", "exchange", "host", "other"]
    assert sum(line.startswith("* ") for line in table) == 1
    assert len([line for line in table if " yes " in line or " no " in line]) == 4
    assert any(" no " in line for line in table)  # one that does not fit is always shown
    ends = {len(line) for line in table[:-1]}
    assert len(ends) == 1
    for words in ("is the fastest of", "does not fit:", "memory of a process", "a step: compute", "assumed:"):
        assert words in text


# Where nothing fits


def test_what_would_help_is_enough() -> None:
    profile = transformer_profile(LLAMA_8B, name="model", precision="bf16")
    machine = hardware(24, host=None)
    with pytest.raises(ConfigError, match="No plan fits `model` with `batch_size=8` of 8,192 tokens") as caught:
        select_plan(profile, machine, world_size=16, batch_size=8, sequence_length=8192, tensor_parallel=False)
    text = str(caught.value)
    assert "GiB of 24.0 GiB may be used" in text
    batch = int(text.split("set `batch_size=")[1].split("`")[0])
    devices = int(text.split("launch ")[1].split(" ")[0].replace(",", ""))
    select_plan(profile, machine, world_size=devices, batch_size=batch, sequence_length=8192, tensor_parallel=False)
    with pytest.raises(ConfigError, match="No plan fits"):
        select_plan(
            profile, machine, world_size=devices, batch_size=batch + 1, sequence_length=8192, tensor_parallel=False
        )


def test_the_number_of_devices_is_the_least_that_suffices() -> None:
    profile = transformer_profile(LLAMA_8B, name="model", precision="bf16")
    machine = hardware(24, host=None)
    run: dict[str, Any] = {"batch_size": 1, "sequence_length": 1024, "tensor_parallel": False}
    with pytest.raises(ConfigError, match=r"launch [0-9]+ devices") as caught:
        select_plan(profile, machine, world_size=4, **run)
    devices = int(str(caught.value).split("launch ")[1].split(" ")[0])
    select_plan(profile, machine, world_size=devices, **run)
    with pytest.raises(ConfigError, match="No plan fits"):
        select_plan(profile, machine, world_size=devices - 1, **run)


def test_shorter_sequences_are_suggested() -> None:
    profile = transformer_profile(SMALL, name="model", precision="bf16")
    with pytest.raises(ConfigError, match=r"cut sequences to ([0-9,]+) tokens") as caught:
        select_plan(profile, hardware(4, host=None), world_size=8, batch_size=1, sequence_length=100_000)
    length = int(str(caught.value).split("cut sequences to ")[1].split(" ")[0].replace(",", ""))
    select_plan(profile, hardware(4, host=None), world_size=8, batch_size=1, sequence_length=length)
    with pytest.raises(ConfigError, match="No plan fits"):
        select_plan(profile, hardware(4, host=None), world_size=8, batch_size=1, sequence_length=length + 1)


def test_a_host_without_memory_takes_nothing() -> None:
    with pytest.raises(ConfigError, match="of host memory for each process, more than there is"):
        choose(LLAMA_8B, 1, machine={"host_memory_bytes": 16 * GIB})


def test_a_device_that_holds_nothing_is_said_to() -> None:
    with pytest.raises(ConfigError, match="Neither more devices nor smaller batches would be enough"):
        choose(LLAMA_70B, 8, memory_gib=0.1, machine={"host": None})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"world_size": 0}, "`world_size=0` leaves no process"),
        ({"batch_size": 0}, "`batch_size=0` leaves nothing to train on"),
        ({"gradient_accumulation_steps": 1.5}, r"`accumulation_steps=1.5` leaves nothing"),
        ({"reserve": 1.0}, "`reserve=1.0` is no part"),
        ({"optimizer": "adamv"}, "`optimizer='adamv'` is not known.* mean"),
    ],
)
def test_impossible_questions_are_refused(changes: dict[str, Any], match: str) -> None:
    run: dict[str, Any] = {"world_size": 2, "batch_size": 1, **changes}
    with pytest.raises(ConfigError, match=match):
        select_plan(transformer_profile(SMALL), hardware(), **run)


def test_a_length_without_effect_is_refused() -> None:
    profile = replace(transformer_profile(SMALL), sequence_length=None)
    with pytest.raises(ConfigError, match="`sequence_length=128` has no effect"):
        select_plan(profile, hardware(), world_size=1, batch_size=1, sequence_length=128)
