"""The table of dtypes that a model holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accel_precision import DTypeRow, dtype_table, format_dtype_table, precision


@pytest.fixture
def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.BatchNorm1d(2)))
    made[0].bias.requires_grad_(False)
    made.register_parameter("gain", nn.Parameter(torch.ones(4)))
    return made


def test_rows_tell_parts_kinds_and_dtypes_apart(model: nn.Module) -> None:
    def row(name: str, kind: str, dtype: str, tensors: int, trainable: int, elements: int) -> DTypeRow:
        return DTypeRow(
            name=name, kind=kind, dtype=dtype, num_tensors=tensors, num_trainable=trainable, num_elements=elements
        )

    assert dtype_table(model) == [
        row("", "parameter", "float32", 1, 1, 4),
        row("0", "parameter", "float32", 2, 1, 8),
        row("1", "parameter", "bfloat16", 2, 2, 6),
        row("1", "parameter", "float32", 2, 2, 4),
        row("1", "buffer", "float32", 2, 0, 4),
        row("1", "buffer", "int64", 1, 0, 1),
    ]
    assert [each.dtype for each in dtype_table(model, depth=0)] == ["float32", "bfloat16", "float32", "int64"]
    assert [each.name for each in dtype_table(model, depth=2)][:4] == ["", "0", "1.0", "1.1"]


def test_mixed_precision_leaves_the_table_alone(model: nn.Module) -> None:
    before = dtype_table(model)
    wrapped = precision("bf16", device=torch.device("cpu")).wrap_forward(model)
    assert dtype_table(wrapped) == before


def test_printed_rows_are_aligned(model: nn.Module) -> None:
    lines = format_dtype_table(dtype_table(model)).splitlines()
    assert lines[0].split() == ["module", "kind", "dtype", "tensors", "trainable", "elements"]
    assert lines[1].split() == ["(root)", "parameter", "float32", "1", "1", "4"]
    assert len({len(line) for line in lines}) == 1
    assert format_dtype_table([]) == "module  kind  dtype  tensors  trainable  elements"
