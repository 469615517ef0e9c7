from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_data.partition import GlobalBatches, Share, share_of, split_real_rows, split_rows
from accel_state.errors import ConfigError

WORLDS = st.one_of(st.integers(1, 9), st.sampled_from([64, 127, 1024]))


@st.composite
def cuts(draw: st.DrawFn) -> GlobalBatches:
    world, batch_size = draw(WORLDS), draw(st.integers(1, 6))
    num_samples = draw(st.integers(0, 3)) * world * batch_size + draw(st.integers(0, world * batch_size))
    return GlobalBatches(
        num_samples=num_samples,
        batch_size=batch_size,
        world=world,
        drop_last=draw(st.booleans()),
        even=draw(st.booleans()),
    )


@settings(deadline=None)
@given(cuts())
def test_every_sample_is_real_exactly_once_and_in_order(cut: GlobalBatches) -> None:
    seen = []
    for step in range(cut.num_batches):
        for rank in range(cut.world):
            share = cut.share(step, rank)
            seen.extend(range(share.start, share.stop))
    kept = cut.num_samples - cut.num_samples % cut.global_size if cut.drop_last else cut.num_samples
    assert seen == list(range(kept))
    assert cut.consumed(cut.num_batches) == kept


@settings(deadline=None)
@given(cuts())
def test_padding_is_marked_and_repeats_samples_of_its_own_global_batch(cut: GlobalBatches) -> None:
    for step in range(cut.num_batches):
        shares = [cut.share(step, rank) for rank in range(cut.world)]
        assert cut.rows(step) == tuple(share.rows for share in shares)
        assert cut.real_rows(step) == tuple(share.real_rows for share in shares)
        first, last = cut.consumed(step), cut.consumed(step + 1)
        padding = [position for share in shares for position in share.padding]
        assert padding == [first + row % (last - first) for row in range(len(padding))]
        assert not padding or (cut.even and cut.may_pad and step == cut.num_batches - 1)
        gathered = [position for share in shares for position in share.positions]
        assert gathered[: last - first] == list(range(first, last))


@settings(deadline=None)
@given(cuts())
def test_even_ranks_take_equal_steps_and_uneven_ones_differ_by_one_row(cut: GlobalBatches) -> None:
    counts = [cut.count(rank) for rank in range(cut.world)]
    for rank in {0, cut.world // 2, cut.world - 1}:
        assert counts[rank] == sum(cut.share(step, rank).rows > 0 for step in range(cut.num_batches))
    for step in range(cut.num_batches):
        rows = cut.rows(step)
        if cut.even:
            assert len(set(rows)) == 1
        else:
            assert max(rows) - min(rows) <= 1
            assert sorted(rows, reverse=True) == list(rows)
    assert len(set(counts)) == 1 or not cut.even
    assert max(counts) == cut.num_batches


@given(st.integers(0, 200), WORLDS, st.booleans())
def test_rows_of_a_partial_batch_agree_with_its_shares(num_rows: int, world: int, even: bool) -> None:
    shares = [share_of(num_rows, rank, world, even=even, start=5) for rank in range(world)]
    assert tuple(share.rows for share in shares) == split_rows(num_rows, world, even=even)
    assert tuple(share.real_rows for share in shares) == split_real_rows(num_rows, world, even=even)


def test_one_process_never_pads() -> None:
    for num_samples in range(20):
        cut = GlobalBatches(num_samples=num_samples, batch_size=4, world=1)
        assert not cut.may_pad
        assert all(cut.rows(step) == cut.real_rows(step) for step in range(cut.num_batches))


def test_the_last_batch_as_documented() -> None:
    cut = GlobalBatches(num_samples=13, batch_size=4, world=3)
    assert cut.num_batches == 2
    assert [cut.share(1, rank) for rank in range(3)] == [Share(12, 13, ()), Share(13, 13, (12,)), Share(13, 13, (12,))]
    uneven = GlobalBatches(num_samples=13, batch_size=4, world=3, even=False)
    assert [uneven.share(1, rank).rows for rank in range(3)] == [1, 0, 0]
    assert [uneven.count(rank) for rank in range(3)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "given_value"),
    [("num_samples", -1), ("batch_size", 0), ("batch_size", -3), ("world", 0), ("batch_size", True), ("world", 1.5)],
)
def test_numbers_out_of_range_are_refused(name: str, given_value: object) -> None:
    numbers = {"num_samples": 10, "batch_size": 2, "world": 2, name: given_value}
    with pytest.raises(ConfigError, match=f"`{name}={given_value}` was given"):
        GlobalBatches(**numbers)  # type: ignore[arg-type]
