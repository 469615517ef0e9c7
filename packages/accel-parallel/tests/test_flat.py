"""Ranges of flattened tensors: as rectangular parts, put together again, and through a checkpoint of any world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_parallel import checkpoint as files
from accel_parallel.box import Box, boxes_of_range
from accel_parallel.flat import FlatPart
from accel_state.process import Process
from accel_state.testing import run_ranks

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_a_range_is_the_boxes_laid_end_to_end(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    numel = data.draw(st.integers(0, whole.numel() - start))
    boxes = boxes_of_range(shape, start, numel)
    parts = [whole[box.slices].reshape(-1) for box in boxes]
    assert torch.equal(torch.cat([whole.new_empty(0), *parts]), whole.reshape(-1)[start : start + numel])
    assert [box.numel for box in boxes] == [len(part) for part in parts]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_whole_rows_are_one_box() -> None:
    assert boxes_of_range((4, 3, 2), 6, 12) == [Box((1, 0, 0), (2, 3, 2))]


def _values(dtype: torch.dtype) -> torch.Tensor:
    made = torch.linspace(-2, 2, 35).to(dtype).view(5, 7)
    made[0, 0], made[4, 6] = -0.0, float("nan")
    return made


def _ranges(rank: int, cuts: tuple[int, ...], dtype: torch.dtype) -> FlatPart:
    start, end = cuts[rank], cuts[rank + 1]
    return FlatPart(torch.Size((5, 7)), start, _values(dtype).view(-1)[start:end], None)


def _gathered(cuts: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return _ranges(Process.current().topology.rank, cuts, dtype).whole()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranges_are_put_together_bit_by_bit(dtype: torch.dtype) -> None:
    for found in run_ranks(_gathered, 3, (0, 4, 4, 35), dtype):
        assert found.shape == (5, 7)
        assert torch.equal(found.view(torch.uint8), _values(dtype).view(torch.uint8))


def _saved(folder: str, cuts: tuple[int, ...]) -> None:
    process = Process.current()
    state: dict[str, Any] = {"a": {"b": _ranges(process.topology.rank, cuts, torch.float32)}, "steps": 3}
    items = [files.Item("optimizer", "optimizer", state, shared=True)]
    files.save_checkpoint(Path(folder), items, process=process, step=1, strategy="any")


@pytest.mark.parametrize("cuts", [(0, 17, 35), (0, 0, 35), (0, 3, 19, 35)])
def test_a_checkpoint_of_ranges_is_read_by_box(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    folder = tmp_path / "checkpoint"
    run_ranks(_saved, len(cuts) - 1, str(folder), cuts)
    state = files.Checkpoint(folder).read("optimizer", lazy=True)
    stored, wanted = state["a"]["b"], _values(torch.float32)
    assert state["steps"] == 3
    assert torch.equal(stored.read().view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(stored.read(Box((1, 2), (3, 4))), wanted[1:4, 2:6])
