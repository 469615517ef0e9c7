"""Sharding keeps the contract on every mesh: shards, copies of shards, copies alone."""

from __future__ import annotations

import pytest
import torch

from accel_parallel import ParallelismConfig
from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
from accel_parallel.testing import SCENARIOS, check_contract

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
FEW = [BY_NAME[name] for name in ("mean", "items", "items, skipped")]


@pytest.mark.parametrize(
    "parallelism",
    [
        ParallelismConfig(dp_replicate_size=2, dp_shard_size=2),
        pytest.param(ParallelismConfig(dp_replicate_size=2), marks=pytest.mark.matrix),
    ],
    ids=["copies of shards", "copies"],
)
def test_the_contract_holds_on_a_mesh(parallelism: ParallelismConfig) -> None:
    check_contract("fsdp", parallelism=parallelism, scenarios=FEW)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            FullyShardedDataParallelPlugin(reshard_after_forward=False, auto_wrap_policy="no_wrap"),
            marks=pytest.mark.matrix,
        ),
        pytest.param(FullyShardedDataParallelPlugin(cpu_offload=True, min_num_params=20), marks=pytest.mark.matrix),
        FullyShardedDataParallelPlugin(activation_checkpointing=True, transformer_cls_names_to_wrap=["Linear"]),
    ],
    ids=["not resharded", "offloaded", "recomputed"],
)
def test_the_contract_holds_with_options(options: FullyShardedDataParallelPlugin) -> None:
    check_contract("fsdp", world_sizes=[2], scenarios=FEW, options=options)


def test_the_contract_holds_with_gradients_kept_local() -> None:
    check_contract("fsdp", world_sizes=[2], scenarios=[BY_NAME["mean, two models apart"]], dtype=torch.float32)
