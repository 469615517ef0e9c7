"""Which rank has what of a tensor that AutoTP divides, without DeepSpeed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_parallel.deepspeed.tensor import Division, TensorDivision


def test_fused_projections_are_cut_each() -> None:
    """Three blocks of four rows: a rank has two of each, not six that follow each other."""
    division = Division(shape=(12, 2), view=(12, 2), dim=0, widths=((2, 2), (2, 2), (2, 2)))
    whole = torch.arange(24.0).view(12, 2)
    assert division.part(whole, 1)[:, 0].tolist() == [4.0, 6.0, 12.0, 14.0, 20.0, 22.0]


def test_a_matrix_may_be_cut_as_another_shape() -> None:
    division = Division(shape=(12, 2), view=(3, 4, 2), dim=1, widths=((3, 1),))
    assert division.part_shape(0) == (9, 2)
    assert division.part(torch.arange(24.0).view(12, 2), 1)[:, 0].tolist() == [6.0, 14.0, 22.0]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 5), vector=st.booleans())
def test_parts_make_the_whole(data: st.DataObject, ranks: int, vector: bool) -> None:
    widths = data.draw(st.lists(st.tuples(*[st.integers(0, 4)] * ranks), min_size=1, max_size=3))
    length = sum(map(sum, widths))
    other = data.draw(st.integers(1, 3))
    dim = 0 if vector else data.draw(st.integers(0, 1))
    shape = (length,) if vector else ((length, other) if dim == 0 else (other, length))
    division = Division(shape=shape, view=shape, dim=dim, widths=tuple(widths))
    whole = torch.randn(shape)
    parts = [division.part(whole, rank) for rank in range(ranks)]
    assert [tuple(part.shape) for part in parts] == [division.part_shape(rank) for rank in range(ranks)]
    assert sum(part.numel() for part in parts) == whole.numel()
    assert torch.equal(division.whole(parts), whole)


def test_a_model_that_is_not_divided_is_whole() -> None:
    model = torch.nn.Linear(3, 2)
    division = TensorDivision(model)
    assert not division
    assert division.of(model.weight) is None
    assert division.shape_of(model.weight) == (2, 3)
    assert division.gather(model.weight, model.weight) is model.weight
    assert division.cut(model.weight, model.weight) is model.weight


@pytest.mark.parametrize("dim", [0, 1])
def test_uneven_parts_are_as_wide_as_noted(dim: int) -> None:
    shape = (7, 2) if dim == 0 else (2, 7)
    division = Division(shape=shape, view=shape, dim=dim, widths=((4, 3),))
    assert division.part_shape(1)[dim] == 3
    assert torch.equal(division.part(torch.ones(shape), 0), torch.ones(division.part_shape(0)))
