"""Every strategy that this package registers keeps the contract."""

from __future__ import annotations

import pytest
import torch

from accel_parallel import DDPCommunicationHookType, DistributedDataParallelKwargs
from accel_parallel.select import BUILT_IN
from accel_parallel.testing import SCENARIOS, check_contract, reference_trace

WORLDS = {"single": (1,), "ddp": (2, 3), "fsdp": (2, 1, 3)}
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def test_every_registered_strategy_is_tried() -> None:
    elsewhere = {"deepspeed"}  # integration-tests/deepspeed/test_contract.py, where DeepSpeed is installed
    assert WORLDS.keys() | elsewhere == BUILT_IN.keys()


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param(name, size, marks=[pytest.mark.matrix] if name == "fsdp" and size != sizes[0] else [])
        for name, sizes in WORLDS.items()
        for size in sizes
    ],
)
def test_the_contract_holds(name: str, world_size: int) -> None:
    check_contract(name, world_sizes=[world_size])


@pytest.mark.parametrize("name", WORLDS)
def test_the_contract_holds_in_float32(name: str) -> None:
    check_contract(name, world_sizes=WORLDS[name][:1], dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        DistributedDataParallelKwargs(find_unused_parameters=True, bucket_cap_mb=1),
    ],
    ids=["bucket views", "unused parameters"],
)
def test_the_contract_holds_with_options_of_ddp(options: DistributedDataParallelKwargs) -> None:
    check_contract("ddp", world_sizes=[2], scenarios=[BY_NAME["mean"], BY_NAME["items"]], options=options)


def test_scenarios_take_ten_steps_and_meet_a_rank_without_items() -> None:
    for scenario in SCENARIOS:
        (trace,) = reference_trace(scenario, world_size=1, dtype=torch.float64)
        assert len(trace.steps[0]) >= 10
        assert any(step.norm > 0.4 for step in trace.steps[0])
        assert (0.0 in trace.losses.values()) == scenario.by_items


def test_a_wrong_gradient_is_named() -> None:
    rounding = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    with pytest.raises(AssertionError, match=r"`ddp`, 2 process\(es\), mean, rank 0: the gradient of "):
        check_contract("ddp", world_sizes=[2], scenarios=[BY_NAME["mean"]], options=rounding)
