"""Only here, first there, and each its part."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_state import (
    ConfigError,
    Process,
    gather_object,
    local_main_process_first,
    main_process_first,
    on_last_process,
    on_local_main_process,
    on_local_process,
    on_main_process,
    on_process,
    print_main,
    split_between_processes,
)
from accel_state.execution import _part
from accel_state.testing import run_ranks


def identity(value: int = 1) -> int:
    """Give it back."""
    return value


def decorated() -> list[int | None]:
    @on_process(process_index=2)
    def third(value: int) -> int:
        return value

    @on_local_process(local_process_index=1)
    def second_of_node() -> int:
        return 1

    calls = [on_main_process(identity), on_local_main_process(identity), on_last_process(identity)]
    return [*(call() for call in calls), third(7), second_of_node(), on_process(identity, process_index=1)()]


def test_each_decorator_chooses_its_ranks() -> None:
    answers = run_ranks(decorated, 4, nodes=2)
    ranks = [[rank for rank, answer in enumerate(answers) if answer[which] is not None] for which in range(6)]
    assert ranks == [[0], [0, 2], [3], [2], [1, 3], [1]]


def test_before_a_process_is_open_this_is_a_world_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_main_process(identity)(3) == on_last_process(identity)(3) == 3
    assert on_main_process(identity).__doc__ == "Give it back."
    print_main("seen", end="!")
    assert capsys.readouterr().out == "seen!"
    with main_process_first(), local_main_process_first(), split_between_processes([1, 2]) as part:
        assert part == [1, 2]


@pytest.mark.parametrize("index", [-1, 1])
def test_ranks_that_do_not_exist(index: int) -> None:
    with pytest.raises(ConfigError, match=f"`process_index={index}` is none of 1"):
        on_process(identity, process_index=index)()
    with pytest.raises(ConfigError, match=f"`local_process_index={index}` is none of 1"):
        on_local_process(identity, local_process_index=index)()


def ordered(folder: str, fail: bool) -> list[str]:
    rank = Process.current().topology.rank
    raised = ""
    for name, context in (("world", main_process_first()), ("node", local_main_process_first())):
        try:
            with context:
                if rank == 0:
                    time.sleep(0.05)
                with (Path(folder) / name).open("a") as file:
                    file.write(str(rank))
                if fail and rank == 0:
                    raise OSError("disk")
        except OSError as error:
            raised = str(error)
        Process.current().barrier()
    print_main("")
    return [raised, (Path(folder) / "world").read_text(), (Path(folder) / "node").read_text()]


@pytest.mark.parametrize("fail", [False, True])
def test_main_goes_first_and_releases_the_others_even_when_it_fails(tmp_path: Path, fail: bool) -> None:
    answers = run_ranks(ordered, 4, str(tmp_path), fail, nodes=2, timeout_s=20)
    raised, world, node = answers[3]
    assert world[0] == "0"
    assert set(node[:2]) == {"0", "2"}
    assert sorted(world) == sorted(node) == list("0123")
    assert (raised, answers[0][0]) == ("", "disk" if fail else "")


class Dataset:
    """Selects rows, as `datasets.Dataset` does."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Any) -> Dataset:
        return Dataset([self.rows[index] for index in indices])


KINDS = [list, tuple, Dataset, torch.tensor, np.array]


def rows_of(part: Any) -> list[int]:
    return [int(each) for each in (part.rows if isinstance(part, Dataset) else part)]


@given(st.integers(0, 70), st.sampled_from([1, 2, 3, 5, 64, 1024]))
def test_parts_joined_are_the_inputs(length: int, world_size: int) -> None:
    parts = [_part(list(range(length)), rank, world_size, False) for rank in range(world_size)]
    assert [each for part in parts for each in part] == list(range(length))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 70), st.sampled_from([1, 2, 3, 64]))
def test_padding_evens_the_parts_by_the_last_input(length: int, world_size: int) -> None:
    parts = [_part(range(length), rank, world_size, True) for rank in range(world_size)]
    size, longer = divmod(length, world_size)
    for rank, part in enumerate(parts):
        real = size + (rank < longer)
        assert len(part) == -(-length // world_size)
        assert list(part[real:]) == [length - 1] * (len(part) - real)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [False, True])
def test_every_kind_keeps_its_type(kind: Any, padding: bool) -> None:
    inputs = kind([10, 11, 12])
    parts = [_part(inputs, rank, 2, padding) for rank in range(2)]
    assert [type(part) for part in parts] == [type(inputs)] * 2
    assert [rows_of(part) for part in parts] == [[10, 11], [12, 12] if padding else [12]]


def split() -> list[Any]:
    out = []
    for inputs in (["a", "b", "c"], {"x": torch.arange(5), "y": list("abcde")}, [1]):
        with split_between_processes(inputs) as part:
            if isinstance(part, dict):
                out.append([gather_object(part["x"].tolist()), gather_object(part["y"])])
            else:
                out.append(gather_object(part))
    return out


def test_gathered_in_order_equals_the_input() -> None:
    assert run_ranks(split, 3) == [[["a", "b", "c"], [[0, 1, 2, 3, 4], list("abcde")], [1]]] * 3


@pytest.mark.parametrize("inputs", ["text", 5, {1, 2}, torch.tensor(1), np.array(1)])
def test_what_has_no_rows_is_refused(inputs: Any) -> None:
    with pytest.raises(ConfigError, match="has no rows to divide"), split_between_processes(inputs):
        pass


def test_values_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"different lengths \(\{'a': 1, 'b': 2\}\)"):
        split_between_processes({"a": [1], "b": [1, 2]}).__enter__()
