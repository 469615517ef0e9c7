"""The parts of a prediction: collectives, steps, optimizers, and the hardware that they are predicted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_parallel.auto import (
    Hardware,
    Link,
    ModelProfile,
    OptimizerCost,
    TransformerSizes,
    detect_hardware,
    optimizer_cost,
    transformer_profile,
)
from accel_parallel.auto import devices as devices_module
from accel_parallel.auto.cost import StepTime, predict_time
from accel_parallel.auto.devices import hardware_of, host_memory_bytes
from accel_parallel.auto.layout import Layout, Workload
from accel_parallel.auto.links import Group
from accel_state.errors import ConfigError
from accel_state.topology import Axis, MeshShape, Topology

ADAM = OptimizerCost(name="adamw", states=2)
SIZES = TransformerSizes(hidden_size=1024, num_layers=10, num_heads=16, vocab_size=32_000)


def machine(**changes: Any) -> Hardware:
    made = Hardware(
        name="device",
        memory_bytes=80 * 2**30,
        flops_per_s={"float32": 50e12, "bfloat16": 500e12},
        memory_bytes_per_s=2e12,
        devices_per_node=8,
        intra_node=Link(bytes_per_s=200e9, latency_s=1e-6),
        inter_node=Link(bytes_per_s=10e9, latency_s=10e-6),
        host=Link(bytes_per_s=20e9, latency_s=10e-6),
        host_memory_bytes=1000 * 2**30,
        efficiency=0.5,
    )
    return replace(made, **changes)


def predict(layout: Layout, hardware: Hardware | None = None, **work: Any) -> StepTime:
    profile = transformer_profile(SIZES, precision="bf16")
    workload = Workload(**{"batch_size": 4, "sequence_length": 2048, **work})
    return predict_time(profile, layout, workload, ADAM, hardware or machine())


# Collectives


@pytest.mark.parametrize(
    ("size", "stride", "per_node", "num_nodes"),
    [(8, 1, 8, 1), (64, 1, 8, 8), (8, 8, 1, 8), (16, 4, 2, 8), (4, 2, 4, 1), (1, 1, 1, 1), (1024, 1, 8, 128)],
)
def test_where_a_group_lies(size: int, stride: int, per_node: int, num_nodes: int) -> None:
    group = Group(size=size, stride=stride, hardware=machine())
    assert (group.per_node, group.num_nodes) == (per_node, num_nodes)


def test_a_group_lies_where_the_topology_says() -> None:
    """Against the ranks of a mesh, node by node."""
    hardware = machine()
    for shard, tp in ((8, 1), (4, 2), (16, 2), (2, 8), (32, 1)):
        copies = 64 // shard // tp
        mesh = MeshShape(dp_replicate=copies, dp_shard=shard, tp=tp)
        topology = Topology(world_size=64, local_world_size=8, mesh=mesh)
        axes: tuple[tuple[Axis, int, int], ...]
        axes = (("dp_shard", shard, tp), ("tp", tp, 1), ("dp_replicate", copies, tp * shard))
        for axis, size, stride in axes:
            nodes = [rank // 8 for rank in topology.ranks_along(axis)]
            group = Group(size=size, stride=stride, hardware=hardware)
            assert group.num_nodes == len(set(nodes))
            assert group.per_node == max(nodes.count(node) for node in nodes)


def test_a_ring_within_a_node() -> None:
    group = Group(size=8, hardware=machine())
    assert group.gather_s(1e9) == pytest.approx(7e-6 + 7 / 8 * 1e9 / 200e9)
    assert group.reduce_s(1e9) == pytest.approx(2 * group.gather_s(1e9))


def test_a_ring_over_nodes_has_the_cards_of_its_members() -> None:
    assert Group(size=16, hardware=machine()).gather_s(1e9) == pytest.approx(14e-6 + 10e-6 + 15 / 16 * 1e9 / 80e9)
    one_a_node = Group(size=2, stride=8, hardware=machine())
    assert one_a_node.gather_s(1e9) == pytest.approx(10e-6 + 1 / 2 * 1e9 / 10e9)


def test_one_rank_exchanges_nothing() -> None:
    assert Group(size=1, hardware=machine()).reduce_s(1e9) == 0.0


# Steps


def test_one_process_only_computes() -> None:
    time = predict(Layout(strategy="single"))
    profile = transformer_profile(SIZES)
    flops = 6 * (10 * SIZES.matrix_numel + 32_000 * 1024) * 8192 + 12 * 10 * 1024 * 2048 * 8192
    assert time.compute_s == pytest.approx(flops / 250e12, rel=0.01)
    assert time.communication_s == time.overhead_s == time.recompute_s == 0.0
    assert time.optimizer_s == pytest.approx((3 + 4) * 4 * profile.num_parameters / 2e12)
    assert time.samples == 4
    assert time.per_sample_s == pytest.approx(time.total_s / 4)


def test_small_batches_wait_for_memory() -> None:
    time = predict(Layout(strategy="single"), batch_size=1, sequence_length=1)
    assert time.compute_s >= 3 * 2 * transformer_profile(SIZES).num_parameters / 2e12


def test_checkpointing_computes_blocks_again() -> None:
    plain, again = (predict(Layout(strategy="single", checkpointing=each)) for each in (False, True))
    assert again.compute_s == plain.compute_s
    assert 0.2 * plain.compute_s < again.recompute_s < plain.compute_s / 3


def test_ddp_hides_all_but_the_last_bucket() -> None:
    layout = Layout(strategy="ddp", replicate=8)
    profile = transformer_profile(SIZES)
    fast = predict(layout)
    buckets = round(4 * profile.num_parameters / (25 * 2**20))
    bucket = Group(size=8, hardware=machine()).reduce_s(4 * profile.num_parameters / buckets)
    assert fast.reduce_s == pytest.approx(bucket)
    slow = predict(layout, machine(intra_node=Link(bytes_per_s=1e9, latency_s=1e-6)))
    all_s = Group(size=8, hardware=machine(intra_node=Link(bytes_per_s=1e9, latency_s=0.0))).reduce_s(
        4.0 * profile.num_parameters
    )
    assert slow.reduce_s == pytest.approx(all_s - 2 / 3 * slow.compute_s, rel=0.01)


def test_windows_exchange_once_under_ddp_and_each_time_when_sharded() -> None:
    slow = machine(intra_node=Link(bytes_per_s=1e9, latency_s=1e-6))
    copied, sharded = Layout(strategy="ddp", replicate=8), Layout(strategy="fsdp", shard=8, reshard=True)
    once = [predict(each, slow) for each in (copied, sharded)]
    window = [predict(each, slow, accumulation_steps=4) for each in (copied, sharded)]
    assert window[0].reduce_s == pytest.approx(once[0].reduce_s)
    assert window[1].communication_s == pytest.approx(4 * once[1].communication_s)
    assert window[0].compute_s == pytest.approx(4 * once[0].compute_s)
    assert window[0].samples == 4 * once[0].samples
    assert window[0].optimizer_s == once[0].optimizer_s


def test_resharding_gathers_twice() -> None:
    slow = machine(intra_node=Link(bytes_per_s=0.1e9, latency_s=0.0))  # so slow that nothing is hidden to speak of
    twice, once = (predict(Layout(strategy="fsdp", shard=8, reshard=each), slow) for each in (True, False))
    profile = transformer_profile(SIZES)
    blocks = 10 * profile.blocks[0].weights.numel
    assert twice.communication_s - once.communication_s == pytest.approx(7 / 8 * 2 * blocks / 0.1e9, rel=0.01)
    volume = 7 / 8 * (2 + 4) * profile.num_parameters / 0.1e9  # gathered in 16 bits, reduced in 32
    assert once.communication_s == pytest.approx(volume, rel=0.01)
    assert twice.copy_s > once.copy_s


def test_copies_of_shards_exchange_shards() -> None:
    slow = machine(inter_node=Link(bytes_per_s=0.1e9, latency_s=0.0))
    time = predict(Layout(strategy="fsdp", replicate=8, shard=8, reshard=True), slow)
    expected = 2 * 7 / 8 * 4 * transformer_profile(SIZES).num_parameters / 8 / 0.1e9
    hidden = 2 / 3 * time.compute_s  # behind backward, but for the root's
    assert expected - hidden < time.reduce_s < expected
    assert time.reduce_s == pytest.approx(expected, rel=0.02)
    assert time.gather_s < 0.01 * time.reduce_s


def test_tensor_parallel_reduces_hidden_states() -> None:
    time, again = (predict(Layout(strategy="fsdp", tp=8, reshard=True, checkpointing=each)) for each in (False, True))
    one = Group(size=8, hardware=machine()).reduce_s(2 * 1024 * 8192)
    assert time.tensor_s == pytest.approx(4 * 10 * one)
    assert again.tensor_s == pytest.approx(6 * 10 * one)
    assert time.samples == 4
    assert time.compute_s < predict(Layout(strategy="single")).compute_s / 3


def test_offload_waits_for_the_host() -> None:
    layout = Layout(strategy="fsdp", shard=8, reshard=True, offload=True)
    slow = machine(host=Link(bytes_per_s=0.1e9, latency_s=0.0), host_memory_bytes_per_s=50e9)
    time = predict(layout, slow)
    shard = 4 * transformer_profile(SIZES).num_parameters / 8
    assert time.offload_s == pytest.approx((2 + 1) * shard / 0.1e9 - time.compute_s, rel=0.01)
    assert time.optimizer_s == pytest.approx(7 * shard * 8 / 50e9, rel=0.01)


def test_parts_add_up() -> None:
    time = predict(Layout(strategy="fsdp", replicate=2, shard=8, tp=2, reshard=True, checkpointing=True, offload=True))
    assert time.total_s == pytest.approx(sum(value for _, value in time.parts()))
    assert time.overhead_s == pytest.approx(0.03 * time.compute_s)


# Optimizers


@pytest.mark.parametrize(
    ("make", "states", "extra"),
    [
        (lambda p: torch.optim.AdamW(p), 2, 1),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3, 1),
        (lambda p: torch.optim.AdamW(p, foreach=False), 2, 0),
        (lambda p: torch.optim.AdamW(p, fused=True), 2, 0),
        (lambda p: torch.optim.SGD(p), 0, 1),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 1, 1),
        (lambda p: torch.optim.RMSprop(p), 1, 1),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), 3, 1),
        (lambda p: torch.optim.Adagrad(p), 1, 1),
    ],
)
def test_optimizers_are_known_by_what_they_keep(make: Any, states: int, extra: int) -> None:
    """Against the states that torch really makes."""
    parameter = nn.Parameter(torch.ones(1000))
    optimizer = make([parameter])
    parameter.grad = torch.ones(1000)
    optimizer.step()
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    kept = sum(value.numel() for value in tensors if value.dim())
    cost = optimizer_cost(optimizer)
    assert (cost.states, cost.step_extra) == (states, extra)
    assert kept == states * 1000
    assert cost.kept_bytes(numel=1000, size_bytes=4000) == 4 * kept


def test_optimizers_by_name() -> None:
    assert optimizer_cost("AdamW").states == 2
    assert optimizer_cost("adamw_8bit").kept_bytes(numel=1000, size_bytes=4000) == 2000
    own = OptimizerCost(name="mine", states=5)
    assert optimizer_cost(own) is own


def test_unknown_optimizers_are_refused() -> None:
    class Mine(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

    with pytest.raises(ConfigError, match=r"`optimizer='Mine'` is not known.*`OptimizerCost"):
        optimizer_cost(Mine([nn.Parameter(torch.ones(1))]))
    with pytest.raises(ConfigError, match="`states=-1` is no amount of memory"):
        OptimizerCost(name="mine", states=-1)


# Hardware


def test_the_cpu_is_this_machine() -> None:
    whole = detect_hardware(Topology(), "cpu")
    shared = detect_hardware(Topology(world_size=4, local_world_size=4), torch.device("cpu"))
    assert whole.memory_bytes == host_memory_bytes()
    assert shared.memory_bytes == whole.memory_bytes // 4
    assert shared.devices_per_node == 4
    assert whole.host is None
    assert whole.flops_of("bfloat16") == whole.flops_of("float32") > 0
    assert whole.assumed


def test_a_container_may_use_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices_module, "_LIMITS", (str(limit), str(tmp_path / "missing")))
    before = host_memory_bytes()
    limit.write_text("max\n")
    assert host_memory_bytes() == before
    limit.write_text("1048576\n")
    assert host_memory_bytes() == 1_048_576


@pytest.mark.parametrize(
    ("name", "bf16", "intra"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 450e9),
        ("NVIDIA H100 PCIe", 756e12, 55e9),
        ("NVIDIA H200", 989e12, 450e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 300e9),
        ("NVIDIA A100-PCIE-40GB", 312e12, 27e9),
        ("Tesla V100-SXM2-32GB", 15.7e12, 150e9),
        ("NVIDIA L40S", 362e12, 27e9),
        ("NVIDIA GeForce RTX 4090", 165e12, 27e9),
    ],
)
def test_devices_are_known_by_name(name: str, bf16: float, intra: float) -> None:
    made = hardware_of(name, memory_bytes=80 * 2**30, topology=Topology(world_size=16, local_world_size=8))
    assert (made.name, made.memory_bytes, made.devices_per_node) == (name, 80 * 2**30, 8)
    assert made.flops_per_s["bfloat16"] == bf16
    assert made.intra_node.bytes_per_s == intra
    assert not any("no table" in note for note in made.assumed)


def test_an_unknown_device_is_an_ordinary_one_and_says_so() -> None:
    made = hardware_of("Frobnicator 9000", memory_bytes=2**34, topology=Topology())
    assert any("'Frobnicator 9000' is in no table" in note for note in made.assumed)
    assert made.memory_bytes == 2**34


def test_another_kind_of_device_needs_its_figures() -> None:
    with pytest.raises(ConfigError, match="memory and speed of a device of type 'meta' are not known"):
        detect_hardware(Topology(), "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a CUDA device for its memory")
def test_a_real_device_says_how_much_memory_it_has() -> None:
    made = detect_hardware(Topology(), torch.device("cuda", 0))
    assert made.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert made.host is not None
    assert made.host_memory_bytes > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"memory_bytes": 0}, "`memory_bytes=0` describes no device"),
        ({"devices_per_node": 0}, "`devices_per_node=0` describes no device"),
        ({"flops_per_s": {"bfloat16": 1e12}}, "does not say how fast the device multiplies"),
        ({"efficiency": 1.5}, "`efficiency=1.5` is no part of the peak"),
    ],
)
def test_impossible_hardware_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        machine(**changes)


def test_a_link_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`Link\(bytes_per_s=0, latency_s=0\)` moves nothing"):
        Link(bytes_per_s=0, latency_s=0)


def test_a_profile_of_an_unknown_precision_is_refused() -> None:
    profile: ModelProfile = transformer_profile(SIZES)
    with pytest.raises(ConfigError, match="`precision='int8'` is not a mixed precision"):
        replace(profile, precision="int8")  # type: ignore[arg-type]
