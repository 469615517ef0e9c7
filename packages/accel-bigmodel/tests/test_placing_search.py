"""Placements of chains: against every contiguous placement there is, and against filling one place after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_bigmodel.placing.chain import Chain, ChainBuilder
from accel_bigmodel.placing.cost import Prediction, Problem, evaluate
from accel_bigmodel.placing.memory import UNLIMITED
from accel_bigmodel.placing.plan import plan_device_map
from accel_bigmodel.placing.search import Strategy, search
from accel_bigmodel.placing.workload import DeviceSpeed, Machine, Workload
from accel_state.errors import ConfigError

Sizes = list[tuple[int, int, int]]
"""Rows of a matrix with 8 columns, elements of a buffer, and with which earlier layer its matrix is tied (0: none)."""


def build(sizes: Sizes) -> Chain:
    builder = ChainBuilder()
    owners: list[int] = []
    for number, (_, buffer, tie) in enumerate(sizes):
        owner = owners[tie - 1] if 0 < tie <= len(owners) else number
        owners.append(owner)
        builder.add_tensor(f"layers.{number}.weight", owner, (sizes[owner][0], 8), torch.float32)
        if buffer:
            builder.add_tensor(f"layers.{number}.buffer", (number, "buffer"), (buffer,), torch.float32, is_buffer=True)
        builder.end_layer(f"layers.{number}", "Block", is_block=number % 2 == 0)
    return builder.finish()


def every_contiguous(problem: Problem) -> Iterator[list[int]]:
    """Every placement of the shape that the search looks at: large units kept, a resident prefix, a kept suffix."""
    count = problem.num_computing
    needs = [r + k + a for r, k, a in zip(problem.resident, problem.kv, problem.activations, strict=True)]
    large = [unit for unit, need in enumerate(needs) if need > max(problem.budgets[:count])]
    order = [unit for unit in range(len(needs)) if unit not in large]
    for prefix in range(len(order) + 1):
        kept = sorted([*large, *order[prefix:]])
        for places in itertools.combinations_with_replacement(range(count), prefix):
            for stores in itertools.combinations_with_replacement(range(count, len(problem.budgets)), len(kept)):
                placement = [-1] * len(needs)
                for unit, place in zip([*order[:prefix], *kept], [*places, *stores], strict=True):
                    placement[unit] = place
                yield placement


def fitting(problem: Problem) -> list[Prediction]:
    predictions = [evaluate(problem, placement) for placement in every_contiguous(problem)]
    return [each for each in predictions if each.fits]


SPEEDS = (
    DeviceSpeed(tflops=1e-6, memory_gb_s=1e-2),
    DeviceSpeed(tflops=1e-8, memory_gb_s=1e-4),
    DeviceSpeed(tflops=1e-9, memory_gb_s=1e-5),
)
WORKLOADS = (
    None,
    Workload(sequence_length=3),
    Workload(sequence_length=9, phase="decode"),
    Workload(sequence_length=6, activation_bytes=200),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layers = st.tuples(st.integers(1, 40), st.sampled_from([0, 0, 5]), st.sampled_from([0, 0, 0, 0, 1, 2]))
    chain = build(draw(st.lists(layers, min_size=1, max_size=6)))
    num_devices = draw(st.integers(0, 3))
    largest = max(layer.total_bytes for layer in chain.layers)
    shares = st.sampled_from([0.0, 0.2, 0.35, 0.6, 0.9, 1.5])
    budgets: dict[int | str, int] = {
        place: int(chain.total_bytes * draw(shares)) + draw(st.sampled_from([0, 1, 2])) * largest
        for place in range(num_devices)
    }
    budgets["cpu"] = int(chain.total_bytes * draw(shares))
    budgets["disk"] = draw(st.sampled_from([UNLIMITED, UNLIMITED, 0, 2000]))
    workload = draw(st.sampled_from(WORKLOADS))
    kv = st.lists(st.integers(0, 300), min_size=len(chain.layers), max_size=len(chain.layers))
    machine = Machine(
        bus_gb_s=draw(st.sampled_from([1e-5, 1e-4, 1e-2])),
        disk_gb_s=draw(st.sampled_from([1e-6, 1e-2])),
        peer_gb_s=draw(st.sampled_from([1e-6, 1e-5, 1.0])),
        devices={place: draw(st.sampled_from(SPEEDS)) for place in [*range(num_devices), "cpu"]},
        staging_slots=draw(st.integers(1, 3)),
        overlap_loss=draw(st.sampled_from([0.0, 0.03])),
    )
    return Problem(
        chain,
        budgets,
        main=draw(st.sampled_from([None, *range(num_devices)])),
        workload=workload,
        machine=machine,
        offload_buffers=draw(st.booleans()),
        kv_bytes=draw(kv) if workload else None,
    )


@settings(max_examples=600, deadline=None)
@given(problems())
def test_auto_is_as_fast_as_the_fastest_of_all_contiguous_placements(problem: Problem) -> None:
    possible = fitting(problem)
    found = search(problem, "auto")
    if found is None:
        assert not possible
        return
    prediction = evaluate(problem, found)
    assert prediction.fits
    assert not possible or prediction.seconds <= min(each.seconds for each in possible) * (1 + 1e-8)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_auto_is_never_slower_than_any_other_strategy(problem: Problem) -> None:
    auto = search(problem, "auto")
    others: list[tuple[Strategy, bool]] = [
        ("sequential", False), ("sequential", True), ("balanced", True), ("balanced_low_0", True)
    ]  # fmt: skip
    for strategy, around_large in others:
        other = search(problem, strategy, around_large=around_large)
        if other is not None:
            assert evaluate(problem, other).fits
            assert auto is not None
            assert evaluate(problem, auto).seconds <= evaluate(problem, other).seconds * (1 + 1e-8)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.just(0), st.just(0)), min_size=1, max_size=7), st.integers(1, 3))
def test_balanced_fills_the_fullest_device_as_little_as_any_placement_that_streams_nothing(
    sizes: Sizes, num_devices: int
) -> None:
    chain = build(sizes)
    budgets: dict[int | str, int] = dict.fromkeys(range(num_devices), 1 << 20)
    problem = Problem(chain, {**budgets, "cpu": 1 << 20})
    for strategy in ("balanced", "auto"):
        found = search(problem, strategy)
        assert found is not None
        prediction = evaluate(problem, found)
        least = min(each.largest_share for each in fitting(problem) if not each.streamed_bytes)
        assert prediction.streamed_bytes == 0
        assert prediction.largest_share <= least + 1e-6


@settings(max_examples=50, deadline=None)
@given(problems())
def test_units_lie_in_one_place_and_every_unit_in_some(problem: Problem) -> None:
    found = search(problem, "balanced")
    if found is not None:
        assert len(found) == len(problem.chain.units)
        assert all(0 <= place < len(problem.places) for place in found)


def even_chain(num: int) -> Chain:
    return build([(32, 0, 0)] * num)  # 1,024 bytes each


def test_sequential_fills_one_place_after_the_other() -> None:
    plan = plan_device_map(even_chain(6), {0: 3000, 1: 5000, "cpu": 10_000}, strategy="sequential")
    assert list(plan.device_map(clean=False).values()) == [0, 0, 1, 1, 1, 1]


def test_balanced_low_0_leaves_the_first_device_empty_if_the_others_suffice() -> None:
    budgets: dict[int | str, int] = {0: 10_000, 1: 3500, 2: 3500}
    plan = plan_device_map(even_chain(6), budgets, strategy="balanced_low_0")
    assert list(plan.device_map(clean=False).values()) == [1, 1, 1, 2, 2, 2]
    plan = plan_device_map(even_chain(8), budgets, strategy="balanced_low_0")
    assert list(plan.device_map(clean=False).values()) == [0, 0, 1, 1, 1, 2, 2, 2]


def test_without_a_workload_all_devices_take_part_and_with_one_the_fewest_hops_are_made() -> None:
    budgets: dict[int | str, int] = {0: 60_000, 1: 60_000}
    alike = plan_device_map(even_chain(6), budgets)
    assert list(alike.device_map(clean=False).values()) == [0, 0, 0, 1, 1, 1]
    together = plan_device_map(even_chain(6), budgets, workload=Workload(sequence_length=8))
    assert set(together.device_map().values()) == {0}


def test_room_for_the_largest_streamed_layers_is_left_on_the_main_device() -> None:
    budgets: dict[int | str, int] = {0: 5 * 1024, 1: 2 * 1024, "cpu": 1 << 20}
    two = Machine(staging_slots=2)
    plan = plan_device_map(even_chain(10), budgets, machine=two)
    assert [plan.place_of(layer) for layer in range(10)] == [0, 0, 0, 1, 1, *["cpu"] * 5]
    assert plan.prediction.uses[0].staging_bytes == 2048
    moved = plan_device_map(even_chain(10), budgets, main=1, machine=two)
    assert [moved.place_of(layer) for layer in range(10)] == [0, 0, 0, 0, 0, *["cpu"] * 5]
    assert plan_device_map(even_chain(10), budgets).prediction.uses[0].staging_bytes == 3072
    uneven = build([(32, 0, 0), (32, 0, 0), (64, 0, 0), (16, 0, 0), (32, 0, 0)])
    plan = plan_device_map(uneven, {0: 4 * 1024, "cpu": 1 << 20}, strategy="sequential")
    assert [plan.place_of(layer) for layer in range(5)] == ["cpu"] * 5
    assert plan.prediction.uses[0].staging_bytes == 2048 + 1024 + 1024


def test_buffers_of_streamed_layers_stay_on_the_main_device_unless_offloaded() -> None:
    chain = build([(32, 256, 0)] * 4)  # 1,024 bytes of each kind
    budgets: dict[int | str, int] = {0: 6 * 1024, "cpu": 1 << 20}
    two = Machine(staging_slots=2)
    stay = plan_device_map(chain, budgets, machine=two)
    assert stay.prediction.uses[0].used_bytes <= 6 * 1024
    assert stay.prediction.uses[0].weight_bytes == 4096
    assert stay.prediction.streamed_bytes == 4096
    away = plan_device_map(chain, budgets, offload_buffers=True, machine=two)
    assert away.prediction.streamed_bytes == 2048 * sum(each == "cpu" for each in away.device_map(clean=False).values())


def test_the_host_computes_where_there_is_no_accelerator_and_needs_no_slots() -> None:
    plan = plan_device_map(even_chain(6), {"cpu": 4 * 1024})
    assert list(plan.device_map(clean=False).values()) == ["cpu"] * 4 + ["disk"] * 2
    assert plan.prediction.main == "cpu"
    assert plan.prediction.uses[0].staging_bytes == 0


def test_tied_layers_lie_together_and_count_once() -> None:
    chain = build([(32, 0, 0), (32, 0, 0), (32, 0, 0), (32, 0, 1)])
    assert chain.total_bytes == 3 * 1024
    assert chain.ties == (("layers.0.weight", "layers.3.weight"),)
    plan = plan_device_map(chain, {0: 2048, 1: 1024}, strategy="sequential")
    assert plan.device_map(clean=False) == {"layers.0": 0, "layers.1": 0, "layers.2": 1, "layers.3": 0}


def test_what_is_behind_a_unit_too_large_for_every_device_may_still_be_resident() -> None:
    chain = build([(32, 0, 0), (128, 0, 0), (32, 0, 0)])
    budgets: dict[int | str, int] = {"cpu": 3 * 1024}
    for strategy in ("auto", "balanced"):
        plan = plan_device_map(chain, budgets, strategy=strategy, around_large=False)
        assert list(plan.device_map(clean=False).values()) == ["cpu", "disk", "cpu"]
    plan = plan_device_map(chain, budgets, strategy="sequential", around_large=False)
    assert list(plan.device_map(clean=False).values()) == ["cpu", "disk", "disk"]
    plan = plan_device_map(chain, budgets, strategy="sequential", around_large=True)
    assert list(plan.device_map(clean=False).values()) == ["cpu", "disk", "cpu"]


def test_a_layer_that_no_device_can_run_is_refused_with_sizes() -> None:
    chain = build([(32, 0, 0), (128, 0, 0), (32, 0, 0)])
    with pytest.raises(ConfigError, match=r"`layers.1` \(Block\) takes 4.00 KiB .* device 0 with 3.00 KiB"):
        plan_device_map(chain, {0: 3 * 1024, "cpu": 1 << 20}, machine=Machine(staging_slots=1))
    chain = build([(32, 0, 0), (256, 0, 0), (32, 0, 0)])
    with pytest.raises(ConfigError, match=r"cannot be streamed, as device 1, where it would run, needs 8.00 KiB"):
        plan_device_map(chain, {0: 3 * 1024, 1: 5 * 1024, "cpu": 1 << 20}, main=1)


def test_time_is_bound_by_the_bus_or_by_compute() -> None:
    chain = even_chain(10)
    budgets: dict[int | str, int] = {0: 6 * 1024, "cpu": 1 << 20}
    speed = DeviceSpeed(tflops=1, memory_gb_s=1)
    slow_bus = Machine(bus_gb_s=1e-6, accelerator=speed, overlap_loss=0.0, staging_slots=2)
    plan = plan_device_map(chain, budgets, machine=slow_bus)
    assert plan.prediction.bound == "copies"
    # Six layers are streamed, 1,024 bytes each at 1,000 bytes a second.
    assert plan.prediction.seconds == pytest.approx(6 * 1.024, rel=1e-3)
    slow_compute = Machine(accelerator=DeviceSpeed(tflops=1e-9, memory_gb_s=1e-6), overlap_loss=0.0)
    plan = plan_device_map(chain, budgets, machine=slow_compute)
    assert plan.prediction.bound == "compute"
    assert plan.prediction.seconds == pytest.approx(10 * 1.024, rel=1e-3)


def test_a_faster_device_takes_more() -> None:
    machine = Machine(devices={1: DeviceSpeed(tflops=3000, memory_gb_s=20_000)})
    plan = plan_device_map(even_chain(10), {0: 9000, 1: 9000}, machine=machine)
    assert list(plan.device_map(clean=False).values()).count(1) == 8


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"disk": 100}, "none of that computes"),
        ({0: 10_000, "cpu": 0, "disk": 0}, r"takes 10.00 KiB in float32, and `max_memory` offers .*Give 240 B more"),
        ({0: 1500, "cpu": 20_000}, "device 0 needs room for 3.00 KiB of slots"),
        ({0: 0, "cpu": 1 << 20}, r"device 0 with 0 B.*needs 1.00 KiB and has 0 B"),
        ({0: 1024 * 9, "cpu": 900, "disk": 900}, "Give more, as whole layers leave gaps"),
    ],
)
def test_budgets_too_small_are_refused_with_sizes(budgets: dict[int | str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_device_map(even_chain(10), budgets)


def test_what_runs_can_be_what_does_not_fit() -> None:
    budgets: dict[int | str, int] = {0: 6000, "cpu": 1 << 20}
    with pytest.raises(ConfigError, match=r"of activations.*smaller dtype or workload"):
        plan_device_map(even_chain(10), budgets, workload=Workload(sequence_length=1000))
    with pytest.raises(ConfigError, match=r"needs room for 3.00 KiB of slots for streamed layers, 8.79 KiB of keys"):
        plan_device_map(even_chain(10), budgets, workload=Workload(activation_bytes=10), kv_bytes=[900] * 10)


def test_a_strategy_or_main_device_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'balanced'\?"):
        plan_device_map(even_chain(2), {0: 9000}, strategy="balance")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`max_memory` does not offer it"):
        plan_device_map(even_chain(2), {0: 9000}, main=3)
    with pytest.raises(ConfigError, match="only keeps weights beside accelerators"):
        plan_device_map(even_chain(2), {0: 9000, "cpu": 9000}, main="cpu")
