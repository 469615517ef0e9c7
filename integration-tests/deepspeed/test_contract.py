"""DeepSpeed under the contract of every strategy, in float32: DeepSpeed trains in nothing wider."""

from __future__ import annotations

import pytest
import torch

from accel_parallel import strategy_class
from accel_parallel.deepspeed.gradients import whole_gradients
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_parallel.testing import check_contract
from accel_parallel.testing.scenarios import SCENARIOS

ONE_MODEL = [scenario for scenario in SCENARIOS if scenario.num_models == 1]
"""An engine of DeepSpeed has one model to train, and so has a strategy; several need one each."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes(stage: int) -> None:
    check_contract(
        "deepspeed",
        world_sizes=[2],
        scenarios=ONE_MODEL,
        dtype=torch.float32,
        options=DeepSpeedPlugin(zero_stage=stage),  # type: ignore[arg-type]
        gradients=whole_gradients,
        timeout_s=200,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stage", "world_size"), [(2, 1), (3, 3)])
def test_other_worlds(stage: int, world_size: int) -> None:
    check_contract(
        "deepspeed",
        world_sizes=[world_size],
        scenarios=ONE_MODEL[:6],
        dtype=torch.float32,
        options=DeepSpeedPlugin(zero_stage=stage),  # type: ignore[arg-type]
        gradients=whole_gradients,
        timeout_s=200,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_host(stage: int) -> None:
    check_contract(
        "deepspeed",
        world_sizes=[2],
        scenarios=ONE_MODEL[1:7],
        dtype=torch.float32,
        options=DeepSpeedPlugin(zero_stage=stage, offload_optimizer_device="cpu"),  # type: ignore[arg-type]
        gradients=whole_gradients,
        timeout_s=200,
    )


def test_the_name_is_known() -> None:
    assert strategy_class("deepspeed").name == "deepspeed"
