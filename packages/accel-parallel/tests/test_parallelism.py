"""Sizes of each kind of parallelism, and the meshes they make, up to a thousand ranks without a process."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from accel_parallel import ParallelismConfig, TorchContextParallelConfig
from accel_parallel.mesh import Mesh
from accel_parallel.parallelism import DeepSpeedSequenceParallelConfig
from accel_parallel.select import select_strategy
from accel_state.env import Launcher, ProcessEnvironment
from accel_state.errors import ConfigError
from accel_state.process import Process, ProcessSettings
from accel_state.topology import MeshShape, Topology


def test_sizes_make_a_mesh() -> None:
    config = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2, cp_size=2, tp_size=2)
    assert config.mesh_shape() == MeshShape(dp_replicate=2, dp_shard=2, cp=2, tp=2)
    assert config.total_size == 16
    config.check_world(16)


@pytest.mark.parametrize(
    ("given", "world_size", "message"),
    [
        ({"dp_shard_size": 3, "tp_size": 2}, 8, "dp_shard_size=3 x tp_size=2 = 6.*8.*Set `dp_shard_size=4`"),
        ({"tp_size": 3}, 8, r"tp_size=3 = 3 .* has 8\. Launch 3"),
        ({"dp_shard_size": 2}, 1, "has 1. Set `dp_shard_size=1`, or launch 2"),
    ],
)
def test_another_world_is_refused_with_sizes_that_fit(given: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelismConfig(**given).check_world(world_size)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp_size": 0}, "`tp_size=0` is not a number of processes"),
        ({"dp_shard_size": "2"}, "`dp_shard_size='2'` is not a number of processes"),
        ({"tp_size": 2, "tp_plan": "colwise"}, "`tp_plan='colwise'` is no plan"),
        ({"cp_size": 2, "sp_size": 2}, "two ways"),
        ({"cp_backend": "torch"}, "has no effect with `cp_size=1`"),
        ({"cp_size": 2, "cp_handler": TorchContextParallelConfig()}, "which has no options"),
        ({"cp_size": 2, "cp_backend": "ring"}, "not available in this version"),
        ({"sp_size": 2, "sp_backend": "megatron"}, "`sp_backend='megatron'` is not available"),
        ({"sp_backend": "deepspeed"}, "`sp_backend='deepspeed'` has no effect with `sp_size=1`"),
        ({"sp_size": 2, "sp_handler": DeepSpeedSequenceParallelConfig()}, "`sp_backend='native'`, which has no opt"),
        (
            {"sp_size": 3, "sp_backend": "deepspeed", "sp_handler": DeepSpeedSequenceParallelConfig(sp_seq_length=16)},
            "`sp_seq_length=16` cannot be divided evenly over `sp_size=3` ranks. Pad or cut sequences to 15 or 18",
        ),
        ({"tp_plan": {"a": "colwise"}}, "has no effect with `tp_size=1`"),
        ({"loss_parallel": True}, "has no effect with `tp_size=1`"),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelismConfig(**given)


def test_options_of_the_ring_are_checked() -> None:
    with pytest.raises(ConfigError, match="is no way for keys and values to travel"):
        TorchContextParallelConfig(cp_comm_strategy="alltoal")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sp_seq_length": 0}, "`sp_seq_length=0` is no number of tokens"),
        ({"sp_seq_length": True}, "`sp_seq_length=True` is no number of tokens"),
        ({"sp_seq_length_is_variable": 1}, "is neither true nor false"),
        ({"sp_seq_length": 8, "sp_seq_length_is_variable": True}, "`sp_seq_length=8` has no effect with"),
        ({"sp_seq_length_is_variable": False}, "and not which. Give `sp_seq_length`"),
        ({"sp_attn_implementation": ""}, "names no attention"),
        ({"sp_attn_implementation": "eager"}, "a mask over one rank's tokens.* Use 'sdpa'"),
        ({"sp_attn_implementation": "flex_attention"}, "replaces by a causal one.* Use 'sdpa'"),
    ],
)
def test_options_of_deepspeeds_attention_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepSpeedSequenceParallelConfig(**given)


def test_lengths_vary_unless_one_is_given() -> None:
    assert DeepSpeedSequenceParallelConfig().is_variable
    assert DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True).is_variable
    assert not DeepSpeedSequenceParallelConfig(sp_seq_length=16).is_variable
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length=16, sp_attn_implementation="sdpa")
    assert ParallelismConfig(sp_size=4, sp_backend="deepspeed", sp_handler=handler).mesh_shape() == MeshShape(sp=4)


_SIZES = st.sampled_from([1, 2, 3, 4, 8])


@settings(max_examples=50, deadline=None)
@given(replicate=_SIZES, shard=_SIZES, cp=st.sampled_from([1, 2, 4]), tp=_SIZES, data=st.data())
def test_every_rank_has_one_place(replicate: int, shard: int, cp: int, tp: int, data: st.DataObject) -> None:
    config = ParallelismConfig(dp_replicate_size=replicate, dp_shard_size=shard, cp_size=cp, tp_size=tp)
    topology = Topology(world_size=config.total_size, mesh=config.mesh_shape())
    rank = data.draw(st.integers(0, config.total_size - 1))
    here = topology.at(rank)
    assert here.ranks_along("tp") == tuple(range(rank - rank % tp, rank - rank % tp + tp))
    assert all(topology.at(peer).data_rank == here.data_rank for peer in here.ranks_along("cp"))
    assert all(topology.at(peer).data_rank == here.data_rank for peer in here.ranks_along("tp"))
    assert len({topology.at(peer).data_rank for peer in here.data_peers}) == replicate * shard


@pytest.mark.parametrize(
    ("world_size", "mesh", "fsdp", "name"),
    [
        (1, None, False, "single"),
        (4, None, False, "ddp"),
        (4, MeshShape(dp_replicate=4), False, "ddp"),
        (4, MeshShape(dp_shard=4), False, "fsdp"),
        (4, MeshShape(dp_replicate=2, tp=2), False, "fsdp"),
        (4, None, True, "fsdp"),
        (1, None, True, "fsdp"),
    ],
)
def test_a_mesh_takes_a_strategy(world_size: int, mesh: MeshShape | None, fsdp: bool, name: str) -> None:
    assert select_strategy(world_size=world_size, mesh=mesh, fsdp=fsdp) == name


@pytest.mark.parametrize(
    ("shape", "rank", "names", "data_shape"),
    [
        (MeshShape(dp_replicate=2, dp_shard=4, tp=4), 17, ("dp_replicate", "dp_shard", "tp"), (2, 4)),
        (MeshShape(dp_shard=4, cp=2, tp=4), 31, ("dp_replicate", "dp_shard_cp", "tp"), (8,)),
        (MeshShape(dp_replicate=8, dp_shard=16, cp=1, tp=8), 1000, ("dp_replicate", "dp_shard", "tp"), (8, 16)),
    ],
    ids=str,
)
def test_groups_of_large_worlds_are_made(
    shape: MeshShape, rank: int, names: tuple[str, ...], data_shape: tuple[int, ...]
) -> None:
    environment = ProcessEnvironment(
        launcher=Launcher.NONE, rank=rank, world_size=shape.size, local_rank=rank % 8, local_world_size=8
    )
    dist.init_process_group("fake", rank=rank, world_size=shape.size, store=FakeStore())
    try:
        with Process.open(ProcessSettings(device="cpu", mesh=shape), environment=environment) as process:
            mesh = Mesh(process)
            assert mesh.root.mesh_dim_names == names
            assert tuple(mesh.data.shape) == data_shape
            assert mesh.tp is not None
            assert mesh.tp.mesh.tolist() == list(process.topology.ranks_along("tp"))
            assert mesh.average_size == shape.size // shape.tp
    finally:
        dist.destroy_process_group()
