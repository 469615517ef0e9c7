from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from accel_data.batches import BatchGroups, num_groups


def indices(groups: BatchGroups, step: int, rank: int) -> list[int] | None:
    taken = groups.taken(step, rank)
    return None if taken is None else [groups.batch(taken[0])[row] for row in taken[1]]


LISTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=5), max_size=12)
WORLDS = st.one_of(st.integers(1, 5), st.just(64))


@given(LISTS, WORLDS, st.booleans())
def test_step_s_of_rank_r_is_batch_s_times_world_plus_r(batches: list[list[int]], world: int, even: bool) -> None:
    groups = BatchGroups(batches, world=world, even=even)
    for step in range(groups.num_batches):
        for rank in range(world):
            found, number = indices(groups, step, rank), step * world + rank
            if number < len(batches):
                assert found == batches[number]
                assert groups.rows(step)[rank] == groups.real_rows(step)[rank] == len(found)
            elif even:
                assert found == batches[step * world]
                assert (groups.rows(step)[rank], groups.real_rows(step)[rank]) == (len(found), 0)
                assert groups.may_pad
            else:
                assert found is None
                assert groups.rows(step)[rank] == 0
    for rank in range(world):
        got = sum(indices(groups, step, rank) is not None for step in range(groups.num_batches))
        assert got == num_groups(len(batches), rank, world, even=even, split=False)
    assert groups.consumed(groups.num_batches) == len(batches)


@given(LISTS, WORLDS, st.booleans())
def test_split_batches_are_cut_in_order(batches: list[list[int]], world: int, even: bool) -> None:
    groups = BatchGroups(batches, world=world, even=even, split=True)
    assert groups.num_batches == len(batches) == num_groups(len(batches), 0, world, even=even, split=True)
    for step, batch in enumerate(batches):
        parts = [indices(groups, step, rank) or [] for rank in range(world)]
        assert tuple(len(part) for part in parts) == groups.rows(step)
        real = groups.real_rows(step)
        assert [each for part, num in zip(parts, real, strict=True) for each in part[:num]] == batch
        assert groups.consumed(step) == step
        assert groups.may_pad or real == groups.rows(step)
