"""Datasets in parts: who reads which, and global batches over parts of different lengths, without a process group."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_data.parts import PartedBatches, Parts, one_part, part_a_node, part_a_rank
from accel_state.errors import ConfigError
from accel_state.topology import MeshShape, Topology


def topologies(world_size: int, local: int, **mesh: int) -> list[Topology]:
    shape = MeshShape(**mesh) if mesh else None
    first = Topology(world_size=world_size, local_world_size=local, mesh=shape)
    return [first.at(rank) for rank in range(world_size)]


@pytest.mark.parametrize(("world_size", "local"), [(64, 8), (1024, 8), (6, 4)])
def test_ranks_of_a_node_share_its_part(world_size: int, local: int) -> None:
    places = topologies(world_size, local)
    for place in places[:: max(1, world_size // 16)]:
        parts = part_a_node(place)
        assert parts.num == place.num_nodes
        assert parts.own == place.node_rank
        assert parts.index == place.local_rank
        assert sum(parts.members) == world_size
    assert part_a_rank(places[3]).own == 3
    assert one_part(places[3]) == Parts((0,) * world_size, 3)


def test_ranks_that_see_the_same_samples_read_the_same_part() -> None:
    for place in topologies(16, 8, dp_shard=4, tp=4):
        parts = part_a_node(place)
        assert (parts.num, parts.world, parts.members) == (2, 4, (2, 2))
        assert parts.own == place.data_rank // 2


def test_peers_on_several_nodes_have_no_part() -> None:
    with pytest.raises(ConfigError, match=r"samples of data rank 0 are on nodes 0, 1.*inside a node, or use"):
        part_a_node(Topology(world_size=4, local_world_size=1, mesh=MeshShape(dp_shard=2, tp=2)))


Cut = tuple[tuple[int, ...], list[int], list[int], int, bool, bool]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    members = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    part_of = tuple(part for part, count in enumerate(members) for _ in range(count))
    lengths = [draw(st.integers(1, 20)) for _ in members]
    starts = [draw(st.integers(0, length)) for length in lengths]
    return part_of, lengths, starts, draw(st.integers(1, 4)), draw(st.booleans()), draw(st.booleans())


@settings(deadline=None)
@given(cuts())
def test_every_sample_of_every_part_is_real_exactly_once(cut: Cut) -> None:
    part_of, lengths, starts, batch_size, drop_last, even = cut
    ranks = []
    for rank in range(len(part_of)):
        parts = Parts(part_of, rank)
        batches = PartedBatches(lengths, starts, parts, batch_size=batch_size, drop_last=drop_last, even=even)
        ranks.append((parts, batches))
    seen: list[list[int]] = [[] for _ in lengths]
    num = ranks[0][1].num_batches
    for step in range(num):
        real = ranks[0][1].real_rows(step)
        rows = ranks[0][1].rows(step)
        for rank, (parts, batches) in enumerate(ranks):
            assert (batches.rows(step), batches.real_rows(step)) == (rows, real)
            positions = batches.positions(step)
            assert len(positions) == rows[rank]
            assert all(0 <= position < lengths[parts.own] for position in positions)
            seen[parts.own] += positions[: real[rank]]
        if even:
            assert len(set(rows)) == 1
            assert rows != real or max(rows) == min(rows)
        if step < ranks[0][1].num_full:
            assert rows == real == (batch_size,) * len(part_of)
        if rows != real:
            assert ranks[0][1].may_pad
    for part, positions in enumerate(seen):
        assert positions == list(range(starts[part], starts[part] + len(positions)))
        assert ranks[0][1].consumed(num, part) == starts[part] + len(positions)
        if not drop_last:
            assert starts[part] + len(positions) == lengths[part]
    for rank, (_, batches) in enumerate(ranks):
        assert batches.count() == sum(batches.rows(step)[rank] > 0 for step in range(num))
    if drop_last:
        left = [length - start for length, start in zip(lengths, starts, strict=True)]
        short = [count < batch_size * part_of.count(part) * (num + 1) for part, count in enumerate(left)]
        assert any(short)


@settings(deadline=None)
@given(cuts(), st.integers(0, 5))
def test_what_follows_a_place_is_what_would_have_followed(cut: Cut, done: int) -> None:
    part_of, lengths, starts, batch_size, drop_last, even = cut
    for rank in range(len(part_of)):
        parts = Parts(part_of, rank)
        whole = PartedBatches(lengths, starts, parts, batch_size=batch_size, drop_last=drop_last, even=even)
        done = min(done, whole.num_batches)
        moved = [whole.consumed(done, part) for part in range(parts.num)]
        rest = PartedBatches(lengths, moved, parts, batch_size=batch_size, drop_last=drop_last, even=even)
        assert rest.num_batches == whole.num_batches - done
        for step in range(rest.num_batches):
            assert rest.positions(step) == whole.positions(step + done)
            assert rest.rows(step) == whole.rows(step + done)
            assert rest.real_rows(step) == whole.real_rows(step + done)
