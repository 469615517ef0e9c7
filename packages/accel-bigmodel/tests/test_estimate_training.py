"""Predicted peaks of inference and training against what the allocator then hands out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from accel_bigmodel import init_empty_weights
from accel_bigmodel.estimate.allocator import allocator_peak_bytes
from accel_bigmodel.estimate.options import EstimateOptions
from accel_bigmodel.estimate.passes import trace_inference, trace_training
from accel_bigmodel.estimate.tracker import AllocationTracker
from accel_state.testing import run_ranks

TOLERANCE = 0.05
"""What is promised. The cases below are far closer; where a kernel takes memory inside, they are not."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        shape = (*states.shape[:2], 4, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm(states)).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        states = states + self.out(mixed)
        return states + functional.dropout(self.down(functional.gelu(self.up(states))), 0.1, self.training)


class Language(nn.Module):
    def __init__(self, width: int = 64, layers: int = 4, tokens: int = 300) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight
        self.checkpoints = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.embed(ids)
        for block in self.blocks:
            states = checkpoint(block, states, use_reentrant=False) if self.checkpoints else block(states)
        return self.head(states)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels take scratch memory for each thread, which is large beside models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perceptron() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)) for _ in range(4)))


def convolutions() -> nn.Module:
    def stage(index: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(16 if index else 3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())

    return nn.Sequential(*map(stage, range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "perceptron": (perceptron, lambda: torch.randn(256, 128)),
    "convolutions": (convolutions, lambda: torch.randn(8, 3, 64, 64)),
    "language": (Language, lambda: torch.randint(0, 300, (8, 128))),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}


def measure_training(
    model: nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer, *, bf16: bool = False, micro: int = 1
) -> int:
    """Bytes at the worst moment of plain training steps: what is there throughout, and what is allocated on top."""
    held: dict[str, Any] = {}

    def step() -> None:
        for _ in range(micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                held["outputs"] = model(batch)
                held["loss"] = held["outputs"].mean()
            held["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held.clear()
    gc.collect()
    states = [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    there = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in
             [*model.parameters(), *model.buffers(), *states, batch]}  # fmt: skip
    return sum(there.values()) + allocator_peak_bytes(lambda: (step(), step()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_peaks_within_the_promise(name: str, optimizer: str, precision: Any) -> None:
    make, make_batch = MODELS[name]
    model, batch = make(), make_batch()
    options = EstimateOptions(device="cpu", optimizer=optimizer, mixed_precision=precision)
    predicted = trace_training(model, batch, options)
    measured = measure_training(model, batch, OPTIMIZERS[optimizer](model.parameters()), bf16=precision == "bf16")
    assert predicted.total_bytes == pytest.approx(measured, rel=TOLERANCE)
    assert sum(predicted.parts.values()) == pytest.approx(predicted.total_bytes, abs=len(predicted.parts))


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adafactor"])
@pytest.mark.parametrize("micro", [1, 3])
def test_training_with_other_optimizers_and_micro_batches(optimizer: str, micro: int) -> None:
    model, batch = perceptron(), torch.randn(32, 128)
    options = EstimateOptions(device="cpu", optimizer=optimizer, accumulation_steps=micro)
    predicted = trace_training(model, batch, options)
    measured = measure_training(model, batch, OPTIMIZERS[optimizer](model.parameters()), micro=micro)
    assert predicted.total_bytes == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_checkpointing_as_a_model_does_it_itself(precision: Any) -> None:
    batch = torch.randint(0, 300, (8, 128))
    plain = trace_training(Language(), batch, EstimateOptions(device="cpu", mixed_precision=precision))
    options = EstimateOptions(device="cpu", checkpointing=True, mixed_precision=precision)
    predicted = trace_training(Language(), batch, options)
    model = Language()
    model.checkpoints = True
    measured = measure_training(model, batch, torch.optim.AdamW(model.parameters()), bf16=precision == "bf16")
    assert predicted.total_bytes == pytest.approx(measured, rel=TOLERANCE)
    assert predicted.total_bytes < 0.8 * plain.total_bytes


@pytest.mark.parametrize("name", MODELS)
def test_inference_peaks_within_the_promise(name: str) -> None:
    make, make_batch = MODELS[name]
    model, batch = make().eval(), make_batch()
    predicted = trace_inference(model, batch, EstimateOptions(device="cpu"))

    def run() -> None:
        with torch.no_grad():
            model(batch)

    run()
    held = [*model.parameters(), *model.buffers(), batch]
    there = sum({each.data_ptr(): each.untyped_storage().nbytes() for each in held}.values())
    assert predicted.total_bytes == pytest.approx(there + allocator_peak_bytes(run), rel=TOLERANCE)


def test_a_model_without_memory_gives_the_same_peak_and_stays_as_it_was() -> None:
    real = Language()
    with init_empty_weights():
        empty = Language()
    batch = torch.empty((4, 32), dtype=torch.int64, device="meta")
    options = EstimateOptions(device="cpu")
    assert trace_training(empty, batch, options) == trace_training(real, batch, options)
    assert {each.device.type for each in empty.parameters()} == {"meta"}
    assert all(each.grad is None for each in real.parameters())
    assert real.head.weight is real.embed.weight
    assert empty.training
    assert not empty._forward_pre_hooks


def test_outputs_that_a_loop_lets_go_of_are_not_counted() -> None:
    batch = torch.randint(0, 300, (8, 64))
    kept = trace_training(Language(), batch, EstimateOptions(device="cpu"))
    dropped = trace_training(Language(), batch, EstimateOptions(device="cpu", keeps_outputs=False))
    assert dropped.total_bytes < kept.total_bytes


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    model = perceptron()
    for each in list(model.parameters())[:-2]:
        each.requires_grad_(False)
    peak = trace_training(model, torch.randn(4, 128), EstimateOptions(device="cpu"))
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert peak.parts["optimizer states"] == pytest.approx(8 * trained, abs=64)


def test_eight_bit_states_take_a_quarter_and_their_scales() -> None:
    size = 1 << 16
    model = nn.Linear(256, 256, bias=False)
    peak = trace_training(model, torch.randn(4, 256), EstimateOptions(device="cpu", optimizer="adamw-8bit"))
    assert peak.parts["optimizer states"] == 2 * (size + 4 * size // 256)


@pytest.mark.parametrize(
    ("sharding", "divided"),
    [("zero1", {"optimizer states"}), ("zero2", {"optimizer states"}), ("fsdp", {"optimizer states", "weights"})],
)
def test_ranks_hold_their_part_of_what_is_divided(sharding: Any, divided: set[str]) -> None:
    batch = torch.randint(0, 300, (2, 16))
    whole = trace_training(Language(), batch, EstimateOptions(device="cpu"))
    part = trace_training(Language(), batch, EstimateOptions(device="cpu", sharding=sharding, ranks=4))
    for name in ("optimizer states", "weights"):
        assert part.parts[name] == pytest.approx(whole.parts[name] / (4 if name in divided else 1), rel=0.01)


def test_data_parallel_divides_nothing_and_has_buckets() -> None:
    batch = torch.randint(0, 300, (2, 16))
    peak = trace_training(Language(), batch, EstimateOptions(device="cpu", sharding="ddp", ranks=8))
    assert peak.parts["DDP's buckets"] == peak.parts["weights"]


def test_sharding_needs_less_the_more_ranks_there_are() -> None:
    batch = torch.randint(0, 300, (1, 8))
    totals = [
        trace_training(Language(), batch, EstimateOptions(device="cpu", sharding="fsdp", ranks=ranks)).total_bytes
        for ranks in (2, 4, 16)
    ]
    assert totals == sorted(totals, reverse=True)


def test_checkpointed_blocks_run_again_by_the_rules_of_a_gpu() -> None:
    batch = torch.empty((8, 128), dtype=torch.int64, device="meta")
    plain = trace_training(Language(), batch, EstimateOptions(optimizer="sgd"))
    again = trace_training(Language(), batch, EstimateOptions(optimizer="sgd", checkpointing=True))
    assert again.total_bytes < plain.total_bytes


def test_attention_on_a_gpu_keeps_no_scores_in_half_precision_and_all_of_them_by_plain_operators() -> None:
    batch = torch.empty((4, 256), dtype=torch.int64, device="meta")
    peaks = {
        kernel: trace_training(Language(), batch, EstimateOptions(dtype="bfloat16", attention=kernel)).total_bytes
        for kernel in ("auto", "flash", "math")
    }
    scores = 4 * 4 * 4 * 256 * 256 * 2  # layers, samples, heads
    assert peaks["auto"] == peaks["flash"]
    assert peaks["math"] - peaks["flash"] >= scores


def sharded_peak(precision: str) -> int:
    """The worst moment of one rank's training step under torch's own `fully_shard`.

    The least of several steps: gloo's threads let go of buffers when they come to it, which on a busy machine is late.
    """
    torch.set_num_threads(1)
    reduced = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16" else {}
    model = Language(width=128, layers=6)
    for unit in [*model.blocks, model]:
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(**reduced))
    optimizer, batch = torch.optim.AdamW(model.parameters(), foreach=False), torch.randint(0, 300, (4, 32))
    held: dict[str, Any] = {}
    peaks = []
    for number in range(10):
        tracker = AllocationTracker(resizes=True)
        with tracker if number >= 2 else nullcontext():
            states = [each for state in optimizer.state.values() for each in state.values()]
            tracker.register("there", [_local(each) for each in [*model.parameters(), *states, *held.values(), batch]])
            held["outputs"] = model(batch)
            held["loss"] = held["outputs"].mean()
            held["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        if number >= 2:
            peaks.append(tracker.peak.total_bytes)
    return min(peaks)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize(("precision", "ranks"), [("no", 2), ("bf16", 2), ("no", 3)])
def test_sharding_peaks_as_fully_shard_does(precision: Any, ranks: int) -> None:
    options = EstimateOptions(device="cpu", sharding="fsdp", ranks=ranks, mixed_precision=precision)
    predicted = trace_training(Language(width=128, layers=6), torch.randint(0, 300, (4, 32)), options)
    measured = min(run_ranks(sharded_peak, ranks, precision))
    assert predicted.total_bytes == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, to measure what its allocator hands out")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_on_a_gpu_peaks_within_the_promise(optimizer: str, precision: Any) -> None:
    model = Language(width=512, layers=6, tokens=8192)
    batch = torch.randint(0, 8192, (8, 512))
    options = EstimateOptions(optimizer=optimizer, mixed_precision=precision)
    predicted = trace_training(model, batch, options).total_bytes
    scratch = torch.ones(64, 64, device="cuda", requires_grad=True)
    (scratch @ scratch).sum().backward()  # libraries take their workspaces once, and keep them
    del scratch
    gc.collect()
    before = torch.cuda.memory_allocated()
    model, batch = model.cuda(), batch.cuda()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    held: dict[str, Any] = {}
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            held["outputs"] = model(batch)
            held["loss"] = held["outputs"].mean()
        held["loss"].backward()
        stepper.step()
        stepper.zero_grad()
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=TOLERANCE)
