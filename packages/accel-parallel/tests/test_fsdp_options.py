"""Options of sharding that change no number: each of them is seen to do what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accel_parallel import Bundle, FullyShardedDataParallelPlugin
from accel_parallel.fsdp.strategy import FSDPStrategy
from accel_parallel.sharded import is_sharded
from accel_state.process import Process
from accel_state.testing import run_ranks


def _network() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))


def _prepared(options: dict[str, Any]) -> nn.Sequential:
    model = _network()
    strategy = FSDPStrategy(Process.current(), options=FullyShardedDataParallelPlugin(**options))
    strategy.prepare(Bundle((model,)))
    return model


def _rows_after_forward(options: dict[str, Any]) -> int:
    """How many of a weight's rows this rank holds between forward and backward."""
    model = _prepared(options)
    out = model(torch.ones(1, 8))
    weight: Any = model.get_parameter("1.0.weight")
    rows = weight.to_local().shape[0] if is_sharded(weight) else weight.shape[0]
    out.sum().backward()
    assert is_sharded(model.get_parameter("1.0.weight"))
    return int(rows)


@pytest.mark.parametrize(("reshard", "rows"), [(True, 2), (False, 8), (2, 4), (4, 2)])
def test_a_block_is_resharded_after_forward_as_told(reshard: bool | int, rows: int) -> None:
    assert run_ranks(_rows_after_forward, 4, {"reshard_after_forward": reshard}) == [rows] * 4


def _settings(options: dict[str, Any]) -> tuple[str, list[list[int]]]:
    """The offload policy of the first block, and which blocks each block gathers ahead."""
    blocks: list[Any] = list(_prepared(options))
    states = [block._get_fsdp_state() for block in blocks]
    ahead = [[states.index(other) for other in state._states_to_forward_prefetch] for state in states]
    return type(states[0]._fsdp_param_group.offload_policy).__name__, ahead


@pytest.mark.parametrize(
    ("options", "policy", "ahead"),
    [
        ({}, "OffloadPolicy", [[], [], []]),
        ({"cpu_offload": True}, "CPUOffloadPolicy", [[], [], []]),
        ({"forward_prefetch": True}, "OffloadPolicy", [[1], [2], []]),
    ],
)
def test_offload_and_prefetch_reach_every_block(options: dict[str, Any], policy: str, ahead: list[list[int]]) -> None:
    assert run_ranks(_settings, 1, options) == [(policy, ahead)]


def _kept(options: dict[str, Any]) -> int:
    """Bytes of activations that autograd keeps of one forward."""
    model = _prepared(options)
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[id(tensor)] = tensor.nbytes if tensor.shape[:1] == (64,) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.ones(64, 8, requires_grad=True))
    return sum(seen.values())


def test_activation_checkpointing_keeps_less() -> None:
    (all_of_them,), (inputs,) = run_ranks(_kept, 1, {}), run_ranks(_kept, 1, {"activation_checkpointing": True})
    assert inputs < all_of_them
