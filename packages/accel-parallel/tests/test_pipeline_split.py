"""Where a chain of blocks is cut into stages, and a batch into micro-batches. No process is started."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accel_parallel.pipeline import plan_split_points
from accel_parallel.pipeline.microbatch import (
    check_outputs,
    check_plain,
    check_result_plain,
    cut_batch,
    find_rows,
    join_outputs,
    named_tensors,
    plan_cut,
)
from accel_parallel.pipeline.split import check_split_points
from accel_state import ConfigError

costs = st.lists(st.integers(0, 50), min_size=1, max_size=9)


def largest(sizes: list[float], firsts: tuple[int, ...]) -> float:
    edges = [0, *firsts, len(sizes)]
    return max(sum(sizes[start:end]) for start, end in pairwise(edges))


@settings(max_examples=200, deadline=None)
@given(costs, st.data())
def test_the_largest_stage_is_as_small_as_it_can_be(sizes: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(sizes)))
    named = {f"h.{index}": size for index, size in enumerate(sizes)}
    points = plan_split_points(named, num_stages)
    firsts = tuple(list(named).index(name) for name in points)
    assert len(firsts) == num_stages - 1
    assert list(firsts) == sorted(set(firsts) - {0})
    best = min(largest(sizes, each) for each in combinations(range(1, len(sizes)), num_stages - 1))
    assert largest(sizes, firsts) == best


def test_costs_need_not_be_bytes() -> None:
    assert plan_split_points({"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.1}, 2) == ["b"]
    assert plan_split_points({"a": 3}, 1) == []


def test_a_long_chain_is_cut_quickly() -> None:
    points = plan_split_points({f"h.{index}": 1 for index in range(256)}, 64)
    assert points == [f"h.{index}" for index in range(4, 256, 4)]


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 pipeline stages were asked for, and the model has 2 block\(s\)"):
        plan_split_points({"a": 1, "b": 1}, 5)


@pytest.mark.parametrize("num_stages", [0, -1, True, 1.5])
def test_a_number_of_stages_is_a_positive_integer(num_stages: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a number of pipeline stages.*Give a positive integer"):
        plan_split_points({"a": 1, "b": 1}, num_stages)


@pytest.mark.parametrize("size", [-1, float("nan")])
def test_a_size_is_no_less_than_nothing(size: float) -> None:
    with pytest.raises(ConfigError, match=r"The size of `b` is .*Give a number from 0 on"):
        plan_split_points({"a": 1, "b": size}, 2)


def test_named_split_points_are_checked() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Linear(1, 1))
    assert check_split_points(model, ["1", "2"], 3) == ("1", "2")
    for points, num_stages, message in (
        (["1.2"], 2, r"names '1.2', which is no module of `Sequential`.* Did you mean '1\.[01]'\?"),
        (["1", "1"], 3, r"names '1' twice"),
        (["1"], 3, r"has 1 name\(s\), which make 2 stage\(s\), and there are 3 processes.*Name 2 module\(s\)"),
        (["1", "1.0"], 3, r"names '1.0', which lies inside '1'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_split_points(model, points, num_stages)


@given(st.integers(1, 40), st.integers(1, 12))
def test_a_batch_comes_out_as_it_went_in(rows: int, num_chunks: int) -> None:
    cut = plan_cut(rows, num_chunks)
    whole = {"mask": torch.ones(1, 3), "scale": torch.tensor(2.0), "n": 3}
    batch: dict[str, Any] = {"args": (torch.arange(rows),), "kwargs": whole}
    chunks = cut_batch(batch, cut)
    assert len(chunks) == cut.num_chunks <= num_chunks
    assert 0 <= cut.padding < cut.size
    assert {chunk["args"][0].shape for chunk in chunks} == {(cut.size,)}
    if rows > 1:
        assert all(chunk["kwargs"] == whole for chunk in chunks)
    joined = join_outputs([{"out": chunk["args"][0], "none": None} for chunk in chunks], cut)
    assert torch.equal(joined["out"], batch["args"][0])
    assert joined["none"] is None


def test_as_few_rows_as_possible_are_filled_up() -> None:
    assert (plan_cut(5, 4).num_chunks, plan_cut(5, 4).size, plan_cut(5, 4).padding) == (3, 2, 1)
    assert (plan_cut(2, 4).num_chunks, plan_cut(2, 4).size) == (2, 1)
    assert (plan_cut(8, 4).num_chunks, plan_cut(8, 4).padding) == (4, 0)


def test_what_the_batch_is_must_be_clear() -> None:
    assert find_rows({"args": (torch.ones(4, 2), torch.ones(1, 2), torch.tensor(1.0)), "kwargs": {}}) == 4
    with pytest.raises(ConfigError, match=r"Input `ids` has 4 rows and `place` has 3.*num_chunks=1"):
        find_rows({"args": (), "kwargs": {"ids": torch.ones(4, 2), "place": torch.ones(3)}})
    with pytest.raises(ConfigError, match=r"without a tensor that has a dimension.*on every rank"):
        find_rows({"args": (3,), "kwargs": {}})
    with pytest.raises(ConfigError, match=r"Input `\[0\]` has no rows"):
        find_rows({"args": (torch.ones(0, 2),), "kwargs": {}})


class DynamicCache:
    pass


def test_what_cannot_be_divided_or_joined_is_refused() -> None:
    check_plain({"args": (1, "a", None, torch.float32, max), "kwargs": {"x": [True]}})
    with pytest.raises(ConfigError, match=r"Input `past` is a DynamicCache, which cannot be divided"):
        check_plain({"args": (), "kwargs": {"past": DynamicCache()}})
    with pytest.raises(ConfigError, match=r"returns a DynamicCache at `\.past`.*Pass `use_cache=False`"):
        check_result_plain({"past": DynamicCache()})
    with pytest.raises(ConfigError, match=r"returns a object at `\[0\]`.*Let the model return tensors only"):
        check_result_plain([object()])
    with pytest.raises(ConfigError, match=r"tensor of shape \(\) at `\.loss` .*loss from the logits.*num_chunks=1"):
        check_outputs({"loss": torch.tensor(1.0)}, plan_cut(4, 2))
    check_outputs({"loss": torch.tensor(1.0)}, plan_cut(4, 1))


def test_tensors_are_named_by_their_paths() -> None:
    tree = {"args": (torch.ones(1), [torch.ones(2)]), "kwargs": {"mask": torch.ones(3)}}
    assert [path for path, _ in named_tensors(tree)] == [".args[0]", ".args[1][0]", ".kwargs.mask"]
