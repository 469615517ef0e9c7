"""Collectives over nested structures, on real gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel_state import (
    CollectiveError,
    ConfigError,
    Process,
    ProcessSettings,
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    gather_ragged,
    pad_across_processes,
    reduce,
)
from accel_state.collectives import _ranks
from accel_state.testing import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int64, torch.bool, torch.float8_e4m3fn]


def rank() -> int:
    return Process.current().topology.rank


def gathered() -> dict[str, Any]:
    here = rank()
    rows = torch.full((2, 3), float(here), requires_grad=True)
    tree = {
        "rows": rows,
        "nested": [torch.tensor(here), (torch.arange(6).reshape(2, 3).t() + here,)],
        "none": torch.empty(0, 4),
    }
    out = gather(tree)
    assert not out["rows"].requires_grad
    assert rows.requires_grad
    by_dtype = [gather(torch.tensor([here, 1]).to(dtype)) for dtype in DTYPES]
    assert [each.dtype for each in by_dtype] == DTYPES
    columns = torch.arange(6, dtype=torch.int16).reshape(2, 3).t()
    assert torch.equal(gather(columns)[:3], columns)
    return {"tree": out, "dtypes": [each.float().tolist() for each in by_dtype]}


@pytest.mark.parametrize("world_size", [2, 3])
def test_gather_joins_in_order_of_rank(world_size: int) -> None:
    for answer in run_ranks(gathered, world_size):
        tree = answer["tree"]
        assert tree["rows"].tolist() == [[float(r)] * 3 for r in range(world_size) for _ in range(2)]
        assert tree["nested"][0].tolist() == list(range(world_size))
        assert tree["nested"][1][0].tolist() == [[r + i, r + i + 3] for r in range(world_size) for i in range(3)]
        assert tree["none"].shape == (0, 4)
        for dtype, values in zip(DTYPES, answer["dtypes"], strict=True):
            assert values == [float(torch.tensor(v).to(dtype)) for r in range(world_size) for v in (r, 1)]


def ragged(rows: list[int]) -> Any:
    here = rank()
    count = rows[here]
    tree = {"x": torch.full((count, 2), float(here)), "flags": torch.full((count,), here == 1)}
    return gather_ragged(tree, rows)


@pytest.mark.parametrize("rows", [[2, 2, 2], [3, 3, 1], [1, 0, 3], [0, 0, 0], [0, 0, 2]])
def test_ragged_rows_come_back_without_padding(rows: list[int]) -> None:
    expected = [r for r, count in enumerate(rows) for _ in range(count)]
    for answer in run_ranks(ragged, 3, rows):
        assert answer["x"].tolist() == [[float(r)] * 2 for r in expected]
        assert answer["flags"].tolist() == [r == 1 for r in expected]


def reduced() -> list[Any]:
    here = rank()
    values = torch.tensor([1.0 + here, 4.0], requires_grad=True)
    transposed = torch.arange(6.0).reshape(2, 3).t() * (here + 1)
    flags = torch.tensor([here == 0, False])
    out = [
        reduce(values),
        reduce(values, "sum"),
        reduce(values, "max", scale=2.0),
        reduce({"a": values}, "min")["a"],
        reduce(values, "none", scale=0.5).detach(),
        reduce(torch.tensor(here), "mean"),
        reduce(flags, "sum"),
        reduce(flags, "max"),
        reduce(flags, "min"),
        reduce(torch.tensor([200], dtype=torch.uint8), "sum"),
        reduce(torch.tensor([1.0], dtype=torch.bfloat16), "sum"),
        reduce(transposed, "sum"),
    ]
    assert values.tolist() == [1.0 + here, 4.0]
    assert transposed[1, 0] == here + 1
    return [(each.dtype, each.tolist()) for each in out]


def test_reduce() -> None:
    answers = run_ranks(reduced, 2)
    kinds, values = zip(*answers[0], strict=True)
    assert values[:4] == ([1.5, 4.0], [3.0, 8.0], [4.0, 8.0], [1.0, 4.0])
    assert values[4] == [0.5, 2.0]
    assert (kinds[5], values[5]) == (torch.float32, 0.5)
    assert (kinds[6], values[6]) == (torch.int64, [1, 0])
    assert (kinds[7], values[7], values[8]) == (torch.bool, [True, False], [False, False])
    assert (kinds[9], values[9]) == (torch.int64, [400])
    assert (kinds[10], values[10]) == (torch.bfloat16, [2.0])
    assert values[11] == (torch.arange(6.0).reshape(2, 3).t() * 3).tolist()
    assert answers[1][:4] == answers[0][:4]


def test_dtype_of_a_mean_does_not_depend_on_the_world() -> None:
    assert reduce(torch.tensor(3)).dtype == torch.float32
    values = torch.ones(2)
    assert reduce(values, "sum") is values
    assert reduce(values, "max", scale=3.0).tolist() == [3.0, 3.0]


def broadcasted() -> Any:
    here = rank()
    given = {
        "f": torch.full((2, 2), float(here)).t(),
        "i": torch.tensor([here], dtype=torch.int16),
        "b": torch.tensor(here == 2),
    }
    out = broadcast(given, from_process=2)
    assert given["f"][0, 0] == here
    objects = broadcast_object_list([here, {"rank": here}], from_process=1)
    assert objects is broadcast_object_list(objects)
    return {key: value.tolist() for key, value in out.items()}, objects


def test_broadcast_gives_the_values_of_one_rank() -> None:
    assert run_ranks(broadcasted, 3) == [({"f": [[2.0, 2.0]] * 2, "i": [2], "b": True}, [1, {"rank": 1}])] * 3


def padded() -> Any:
    here = rank()
    tree = {
        "rows": torch.ones(here + 1, 2),
        "columns": torch.ones(2, 3 - here, dtype=torch.int64),
        "scalar": torch.tensor(here),
        "text": "kept",
    }
    after = pad_across_processes(tree, pad_index=-1)
    before = pad_across_processes(tree, dim=-1, pad_index=7, pad_first=True)
    assert after["scalar"] is tree["scalar"]
    assert pad_across_processes("kept") == after["text"] == before["text"]
    return after["rows"].tolist(), after["columns"].shape, before["columns"].tolist()


def test_padding_reaches_the_longest() -> None:
    first, second = run_ranks(padded, 2)
    assert first[0] == [[1.0, 1.0], [-1.0, -1.0]]
    assert second[0] == [[1.0, 1.0]] * 2
    assert (first[1], second[1]) == ((2, 3), (2, 2))
    assert (first[2], second[2]) == ([[1, 1, 1]] * 2, [[7, 1, 1]] * 2)


def objects() -> Any:
    here = rank()
    return gather_object([here, "x"] if here else [here]), gather_object(here), gather_object([] if here else {"a": 1})


def test_lists_are_joined_and_other_objects_listed() -> None:
    assert run_ranks(objects, 2) == [([0, 1, "x"], [0, 1], [{"a": 1}, []])] * 2


def test_a_world_of_one_gives_back_what_it_got() -> None:
    tree = {"a": torch.ones(2), "b": torch.tensor(1)}
    assert gather(tree) is tree
    assert broadcast(tree) is tree
    assert pad_across_processes(tree) is tree
    assert gather_ragged(tree["a"], [2]) is tree["a"]
    assert gather_object([1]) == [1]
    assert gather_object(1) == [1]
    with Process.open(ProcessSettings(device="cpu", check_collectives=True)) as process:
        assert gather(tree, process=process) is tree
        assert broadcast_object_list([1]) == [1]


def test_arguments_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="`reduction='avg'` is no way to combine"):
        reduce(torch.ones(1), "avg")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`from_process=1` is no rank of a world of 1"):
        broadcast(torch.ones(1), from_process=1)
    with pytest.raises(ConfigError, match=r"`rows=\[1, 1\]` does not say"):
        gather_ragged(torch.ones(1), [1, 1])
    with pytest.raises(ConfigError, match=r"has 2 rows\. Slice"):
        gather_ragged(torch.ones(1), [2])
    with pytest.raises(ConfigError, match=r"`reduce` was given a str at \.a, .*`gather_object`"):
        reduce({"a": "text"})


def refused() -> list[str]:
    with pytest.raises(ConfigError) as gathering:
        gather({"a": ["text"]})
    with pytest.raises(ConfigError) as broadcasting:
        broadcast({"a": [torch.ones(1), "text"]})
    return [str(gathering.value), str(broadcasting.value)]


def test_other_objects_are_refused_with_their_path() -> None:
    first = run_ranks(refused, 2)[0]
    assert "`gather` was given a str at .a[0]" in first[0]
    assert "`gather_object`" in first[0]
    assert "`broadcast` was given a str at .a[1]" in first[1]
    assert "`broadcast_object_list`" in first[1]


CHECKED = ProcessSettings(device="cpu", timeout_s=30.0, check_collectives=True)


def mismatch(which: str) -> str:
    odd = rank() == 1
    rows = torch.ones(3 if odd else 2, 4)
    try:
        if which == "gather":
            gather({"x": rows, "same": torch.ones(1)})
        elif which == "dtype":
            reduce(torch.ones(2, dtype=torch.float64 if odd else torch.float32))
        elif which == "structure":
            broadcast([torch.ones(1)] * (2 if odd else 1))
        elif which == "pad":
            pad_across_processes(torch.ones(2, 3 if odd else 2), dim=0)
        elif which == "operation":
            gather(torch.ones(1)) if odd else reduce(torch.ones(1))
        elif which == "rows":
            gather_ragged(torch.ones(2, 1), [2, 2, 2] if odd else [2, 2, 1 + (rank() == 2)])
        elif which == "length":
            broadcast_object_list([1] * (2 if odd else 1))
    except CollectiveError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize(
    ("which", "parts"),
    [
        ("gather", ["in `gather`", "rank 0, 2: gather with .x: float32[2, 4]", "rank 1: gather with .x: float32[3"]),
        ("dtype", ["rank 1: reduce('mean') with tree: float64[2]"]),
        ("structure", ["rank 1: broadcast(0) with tree: list[2]"]),
        ("pad", ["rank 0, 2: pad_across_processes with tree: float32[*, 2]", "float32[*, 3]"]),
        ("operation", ["rank 0, 2: reduce('mean') with the same tree", "rank 1: gather with the same tree"]),
        ("rows", ["rank 0: gather_ragged with rows: [2, 2, 1]", "rank 1-2: gather_ragged with rows: [2, 2, 2]"]),
        ("length", ["rank 1: broadcast_object_list(0) with tree: list[2]"]),
    ],
)
def test_the_check_names_the_rank_that_differs_on_every_rank(which: str, parts: list[str]) -> None:
    for text in run_ranks(mismatch, 3, which, settings=CHECKED):
        for part in parts:
            assert part in text
        if which != "operation":
            assert "same:" not in text


def agreed() -> int:
    here = rank()
    gather_ragged(torch.ones(here + 1), [1, 2])
    pad_across_processes(torch.ones(here + 1, 2))
    gather_object(here)
    broadcast_object_list([here])
    broadcast({"a": torch.ones(2)})
    return int(gather(torch.ones(2)).sum() + reduce(torch.ones(2), "sum").sum())


def test_the_check_lets_through_what_fits() -> None:
    assert run_ranks(agreed, 2, settings=CHECKED) == [8, 8]


def test_ranks_are_named_in_ranges() -> None:
    assert _ranks([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _ranks(list(range(1024))) == "0-1023"
