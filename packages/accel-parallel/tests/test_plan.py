"""Files of an item: every tensor in one of them, all of about a size, the same whoever plans."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_parallel.checkpoint.plan import PlannedFile, index_name, plan_files

SMALLEST, LARGEST = 16, 256
NAMES = st.text("abc.", min_size=1, max_size=5)
SIZES = st.dictionaries(NAMES, st.integers(0, 100) | st.integers(0, 1000), max_size=30)
Group = tuple[Mapping[str, int], list[int]]


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """Whole tensors of the main process, and divided ones of every rank, of which some names may be taken already."""
    whole, divided = draw(SIZES), draw(SIZES)
    writers = list(range(draw(st.integers(1, 5))))
    return [(whole, [0]), ({name: size for name, size in divided.items() if name not in whole}, writers)]


def planned(content: list[Group]) -> list[PlannedFile]:
    return plan_files("item", content, smallest=SMALLEST, largest=LARGEST)


@given(groups())
def test_every_tensor_is_in_one_file_in_order_and_written_by_one_of_its_writers(content: list[Group]) -> None:
    plan = planned(content)
    assert [name for file in plan for name in file.tensors] == [name for sizes, _ in content for name in sizes]
    assert all(file.tensors for file in plan)
    allowed = {name: writers for sizes, writers in content for name in sizes}
    total = sum(sum(sizes.values()) for sizes, _ in content)
    for file in plan:
        one_of_all = total <= SMALLEST and file.writer == 0
        assert one_of_all or all(file.writer in allowed[name] for name in file.tensors)


@given(groups())
def test_files_of_a_group_are_as_alike_as_their_tensors_allow(content: list[Group]) -> None:
    plan = planned(content)
    for sizes, writers in content:
        files = [file for file in plan if set(file.tensors) <= sizes.keys()]
        held, biggest = sum(sizes.values()), max(sizes.values(), default=0)
        count = max(min(len(writers), held // SMALLEST), -(-held // LARGEST), 1)
        assert len(files) <= count
        for file in files:
            size = sum(sizes[name] for name in file.tensors)
            # A tensor at each end may reach out by half.
            assert size <= held / count + (sizes[file.tensors[0]] + sizes[file.tensors[-1]]) / 2
            assert size <= LARGEST + biggest
        # Work is spread: nobody writes two files while another, who may, writes none.
        written = [sum(file.writer == writer for file in files) for writer in writers]
        assert not files or max(written) - min(written) <= 1


@given(groups())
def test_files_are_numbered_and_the_same_whoever_plans(content: list[Group]) -> None:
    plan = planned(content)
    names = [file.name for file in plan]
    if len(plan) == 1:
        assert names == ["item.safetensors"]
    else:
        assert names == [f"item-{number:05d}-of-{len(plan):05d}.safetensors" for number in range(1, len(plan) + 1)]
    assert planned([(dict(sizes), list(writers)) for sizes, writers in content]) == plan


@given(SIZES.filter(len), st.integers(1, 5))
def test_little_is_one_file_of_the_main_process(sizes: dict[str, int], world: int) -> None:
    names = sorted(sizes)
    half = len(names) // 2
    content = [(dict.fromkeys(names[:half], 0), [0]), (dict.fromkeys(names[half:], 0), list(range(world)))]
    assert planned([(dict(whole), writers) for whole, writers in content]) == [
        PlannedFile("item.safetensors", 0, tuple(names))
    ]


def test_what_is_equal_is_dealt_out_equally() -> None:
    plan = planned([({f"{number:02d}": 32 for number in range(16)}, [0, 1, 2, 3])])
    assert [file.writer for file in plan] == [0, 1, 2, 3]
    assert [len(file.tensors) for file in plan] == [4, 4, 4, 4]


def test_files_above_the_largest_are_cut_whoever_writes_them() -> None:
    plan = planned([({f"{number:02d}": 100 for number in range(10)}, [0])])
    assert [file.writer for file in plan] == [0, 0, 0, 0]
    assert max(len(file.tensors) for file in plan) == 3


def test_a_large_tensor_does_not_leave_crumbs() -> None:
    sizes = {"a": 10_000, **{f"b{number}": 1 for number in range(8)}}
    plan = planned([(sizes, [0, 1, 2, 3])])
    assert [file.tensors for file in plan] == [("a",), tuple(name for name in sizes if name != "a")]


def test_nothing_needs_no_file() -> None:
    assert planned([({}, [0]), ({}, [0, 1])]) == []
    assert index_name("model") == "model.safetensors.index.json"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_plan_does_not_depend_on_the_process(seed: int) -> None:
    code = (
        "from accel_parallel.checkpoint.plan import plan_files; "
        "print(plan_files('i', [({c: ord(c) for c in 'zyxwvu'}, [0, 1, 2])], smallest=9, largest=99))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = plan_files("i", [({c: ord(c) for c in "zyxwvu"}, [0, 1, 2])], smallest=9, largest=99)
    assert run.stdout.strip() == str(expected)
