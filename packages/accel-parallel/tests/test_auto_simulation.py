"""Predicted peaks against a simulation that shares nothing with the prediction: torch's own trackers of allocations.

Real training steps of models of realistic proportions run on fake tensors, through the real `fully_shard` over a fake
process group, and the trackers of ``torch.distributed._tools`` add up what is alive. DDP's reducer copies gradients in
C++, where there are no fake tensors, so that it runs with a smaller model in real memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from accel_parallel.auto import ModelProfile, OptimizerCost, profile_model
from accel_parallel.auto.layout import Layout, Workload
from accel_parallel.auto.memory import Memory, predict_memory
from accel_parallel.recompute import checkpoint_activations
from accel_state.config import MixedPrecision

# A prediction may be this much below what is simulated, and this much above: where it simplifies, it takes the worse.
_BELOW, _ABOVE = 0.025, 0.10
_BATCH = 4


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        parts = self.qkv(self.first_norm(x)).chunk(3, -1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)  # (b, heads, s, size)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        inner: torch.Tensor = self.down(F.gelu(self.up(self.second_norm(x))))
        return x + inner


class Decoder(nn.Module):
    def __init__(self, hidden: int, layers: int, vocab: int, *, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, hidden // 64) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.requires_grad_(False)
            self.norm.requires_grad_(True)
            for layer in self.layers:
                layer.up.requires_grad_(True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), ids.flatten())


# The worst moment of the first is the loss, since its vocabulary is large beside its width; of the second, which is
# wide and deep beside its vocabulary, backward through a block.
NARROW: dict[str, Any] = {"hidden": 1024, "layers": 4, "vocab": 32_000}
WIDE: dict[str, Any] = {"hidden": 2048, "layers": 4, "vocab": 2_000}
SMALL: dict[str, Any] = {"hidden": 256, "layers": 3, "vocab": 2_000}


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """The whole world in shards, or ``(replicate, shard)`` as the test asks."""
    shape = getattr(request, "param", (8,))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    finally:
        dist.destroy_process_group()


def _ids(length: int) -> torch.Tensor:
    return torch.zeros(_BATCH, length, dtype=torch.long)


def _predicted(
    sizes: dict[str, Any], length: int, layout: Layout, *, precision: MixedPrecision = "no", passes: int = 1
) -> Memory:
    with torch.device("meta"):
        model = Decoder(**sizes)
    profile: ModelProfile = profile_model(model, example_inputs=_ids(length), precision=precision)
    # AdamW over one parameter after the other, as on a CPU, needs next to nothing besides its states.
    optimizer = OptimizerCost(name="adamw", states=2)
    return predict_memory(profile, layout, Workload(batch_size=_BATCH, accumulation_steps=passes), optimizer)


def _simulated(model: nn.Module, length: int, *, autocast: bool = False, passes: int = 1) -> int:
    """The most that is alive at once in the second step, when the optimizer has its states."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    ids = _ids(length)

    def forward_backward() -> None:
        casting: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with casting:
            loss = model(ids)
        loss.backward()

    forward_backward()
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(passes - 1):  # the trackers follow one forward: let it be the window's last
        forward_backward()
    sharded = hasattr(model, "unshard")
    tracker = FSDPMemTracker(model, optimizer) if sharded else MemTracker()
    if not sharded:
        tracker.track_external(model, optimizer, ids)
    with tracker:
        forward_backward()
        optimizer.step()
    return max(int(sizes["Total"]) for sizes in tracker.get_tracker_snapshot("peak").values())


def _close(predicted: Memory, simulated: int) -> None:
    assert (1.0 - _BELOW) * simulated <= predicted.total <= (1.0 + _ABOVE) * simulated


@pytest.mark.parametrize(
    ("sizes", "length", "precision", "checkpointing", "passes"),
    [
        (NARROW, 512, "no", False, 1),
        (NARROW, 512, "bf16", True, 1),
        (WIDE, 512, "no", True, 2),
        (WIDE, 1024, "bf16", False, 1),
        ({**NARROW, "tied": True}, 256, "bf16", False, 2),
    ],
)
def test_one_process(
    sizes: dict[str, Any], length: int, precision: MixedPrecision, checkpointing: bool, passes: int
) -> None:
    layout = Layout(strategy="single", checkpointing=checkpointing)
    predicted = _predicted(sizes, length, layout, precision=precision, passes=passes)
    with FakeTensorMode():
        model = Decoder(**sizes)
        if checkpointing:
            checkpoint_activations(model)
        simulated = _simulated(model, length, autocast=precision != "no", passes=passes)
    _close(predicted, simulated)


def _shard(sizes: dict[str, Any], layout: Layout, mesh: DeviceMesh, precision: MixedPrecision) -> nn.Module:
    lower = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = MixedPrecisionPolicy() if precision == "no" else lower
    model = Decoder(**sizes)
    if layout.checkpointing:
        checkpoint_activations(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=layout.reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if layout.reshard else False)
    return model


@pytest.mark.parametrize(
    ("sizes", "length", "precision", "reshard", "checkpointing", "passes"),
    [
        (NARROW, 512, "no", True, False, 1),
        (NARROW, 512, "bf16", True, True, 1),
        (NARROW, 256, "bf16", False, False, 2),
        ({**NARROW, "tied": True}, 16, "no", True, False, 1),
        ({**NARROW, "tied": True}, 512, "no", False, True, 1),
        ({**WIDE, "frozen": True}, 512, "no", True, False, 1),
        (WIDE, 256, "bf16", False, True, 1),
        (WIDE, 1024, "no", True, True, 2),
        (WIDE, 1024, "bf16", True, False, 1),
    ],
)
def test_sharded(
    sizes: dict[str, Any],
    length: int,
    precision: MixedPrecision,
    reshard: bool,
    checkpointing: bool,
    passes: int,
    mesh: DeviceMesh,
) -> None:
    layout = Layout(strategy="fsdp", shard=8, reshard=reshard, checkpointing=checkpointing)
    with FakeTensorMode():
        simulated = _simulated(_shard(sizes, layout, mesh, precision), length, passes=passes)
    _close(_predicted(sizes, length, layout, precision=precision, passes=passes), simulated)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
def test_copies_of_shards(mesh: DeviceMesh) -> None:
    layout = Layout(strategy="fsdp", replicate=4, shard=2, reshard=True)
    with FakeTensorMode():
        simulated = _simulated(_shard(WIDE, layout, mesh, "no"), 512)
    _close(_predicted(WIDE, 512, layout), simulated)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp(checkpointing: bool) -> None:
    tracker = MemTracker()
    with tracker:  # from before the reducer makes its buckets, which nobody could point it to later
        model = Decoder(**SMALL)
        if checkpointing:
            checkpoint_activations(model)
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, _as_it_is)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = _ids(64)
        wrapped(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.reset_mod_stats()
        wrapped(ids).backward()
        optimizer.step()
    simulated = max(int(sizes["Total"]) for sizes in tracker.get_tracker_snapshot("peak").values())
    _close(_predicted(SMALL, 64, Layout(strategy="ddp", replicate=8, checkpointing=checkpointing)), simulated)


def _as_it_is(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """The fake process group has no result that the reducer could take."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_the_moments_that_are_meant_to_be_worst_are() -> None:
    layout = Layout(strategy="fsdp", shard=8, reshard=True)
    assert _predicted(NARROW, 512, layout).moment == "loss"
    assert _predicted(WIDE, 1024, layout).moment == "backward"
