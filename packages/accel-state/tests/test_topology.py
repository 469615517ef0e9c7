"""Ranks, coordinates and data peers, at sizes that no test machine has."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_state import ConfigError, MeshShape, Topology
from accel_state.topology import AXES

SHAPES_64 = [
    MeshShape(dp_replicate=64),
    MeshShape(pp=2, dp_replicate=2, dp_shard=2, cp=2, sp=2, tp=2),
    MeshShape(dp_shard=8, tp=8),
]
SHAPES_1024 = [MeshShape(dp_replicate=4, dp_shard=32, tp=8), MeshShape(pp=4, dp_shard=16, cp=2, sp=2, tp=4)]

axis_sizes = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in AXES})


def world(mesh: MeshShape, per_node: int = 8) -> list[Topology]:
    size = mesh.size
    first = Topology(world_size=size, local_world_size=min(per_node, size), mesh=mesh)
    return [first.at(rank) for rank in range(size)]


def check_world(ranks: list[Topology]) -> None:
    everyone = set(range(len(ranks)))
    coordinates = {tuple(each.coord(axis) for axis in AXES) for each in ranks}
    assert len(coordinates) == len(ranks), "two ranks have one place"
    for axis in AXES:
        lines = {each.ranks_along(axis) for each in ranks}
        assert sorted(rank for line in lines for rank in line) == sorted(everyone), f"{axis} does not partition"
        for each in ranks:
            line = each.ranks_along(axis)
            assert line[each.coord(axis)] == each.rank
            for other in AXES:
                if other != axis:
                    assert {ranks[rank].coord(other) for rank in line} == {each.coord(other)}
    for each in ranks:
        peers = each.data_peers
        assert peers[each.data_rank] == each.rank
        assert [ranks[rank].data_rank for rank in peers] == list(range(each.data_world_size))
    assert len({each.data_peers for each in ranks}) * ranks[0].data_world_size == len(ranks)


@settings(max_examples=30, deadline=None)
@given(axis_sizes)
def test_any_mesh_is_consistent(sizes: dict[str, int]) -> None:
    check_world(world(MeshShape(**sizes)))


@pytest.mark.parametrize("mesh", SHAPES_64 + SHAPES_1024, ids=str)
def test_large_meshes_are_consistent(mesh: MeshShape) -> None:
    check_world(world(mesh))


def test_tensor_parallel_peers_are_neighbours_and_share_data() -> None:
    ranks = world(MeshShape(dp_shard=8, tp=8))
    assert ranks[9].ranks_along("tp") == tuple(range(8, 16))
    assert {ranks[rank].data_rank for rank in range(8, 16)} == {1}
    assert ranks[9].data_peers == tuple(range(1, 64, 8))


def test_nodes_are_filled_in_order() -> None:
    ranks = world(MeshShape(dp_replicate=1024))
    assert (ranks[1023].node_rank, ranks[1023].local_rank, ranks[1023].num_nodes) == (127, 7, 128)
    assert ranks[1023].is_last
    assert not ranks[8].is_main
    assert ranks[8].is_local_main


def test_default_mesh_replicates() -> None:
    assert Topology(world_size=3, rank=2).shape == MeshShape(dp_replicate=3)
    assert str(MeshShape()) == "one process"
    assert str(MeshShape(dp_shard=2, tp=4)) == "dp_shard=2 x tp=4"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"world_size": 0}, "`world_size=0` leaves no process"),
        ({"local_world_size": 0}, "`local_world_size=0` leaves no process"),
        ({"rank": 2, "world_size": 2}, r"`rank=2` lies outside 0\.\.1"),
        ({"local_rank": -1}, "`local_rank=-1` lies outside"),
        ({"world_size": 2, "local_world_size": 4}, "is more than `world_size=2`"),
        ({"world_size": 8, "mesh": MeshShape(dp_shard=3, tp=2)}, "dp_shard=3 x tp=2` needs 6 .* world has 8"),
    ],
)
def test_numbers_that_contradict_are_refused(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Topology(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_axis_must_be_a_count(size: object) -> None:
    with pytest.raises(ConfigError, match="is not a number of processes"):
        MeshShape(tp=size)  # type: ignore[arg-type]


def test_unknown_axis_is_named() -> None:
    with pytest.raises(ConfigError, match="'dp' is not an axis of the mesh"):
        MeshShape().size_of("dp")  # type: ignore[arg-type]
