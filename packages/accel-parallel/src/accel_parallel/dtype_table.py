"""Which dtypes a model holds, in a few lines, and which of them have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import nn

__all__ = ["DtypeRow", "changed_dtypes", "dtype_table", "dtypes_of", "format_dtype_table"]


@dataclass(frozen=True, slots=True)
class DtypeRow:
    """All tensors of a model that are of one kind."""

    kind: Literal["parameter", "buffer"]
    dtype: torch.dtype
    requires_grad: bool
    num_tensors: int
    num_elements: int
    """Of the whole tensors, where they are divided over ranks."""
    size_bytes: int
    """The same in memory."""
    example: str
    """Name of the first of them."""


def dtype_table(model: nn.Module) -> list[DtypeRow]:
    """One row for each kind, dtype and whether it is trained, largest first. Tied parameters count once."""
    rows: dict[tuple[Literal["parameter", "buffer"], torch.dtype, bool], list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        rows.setdefault(("parameter", parameter.dtype, parameter.requires_grad), []).append((name, parameter))
    for name, buffer in model.named_buffers():
        rows.setdefault(("buffer", buffer.dtype, buffer.requires_grad), []).append((name, buffer))
    table = [
        DtypeRow(
            kind=kind,
            dtype=dtype,
            requires_grad=requires_grad,
            num_tensors=len(members),
            num_elements=sum(tensor.numel() for _, tensor in members),
            size_bytes=sum(tensor.numel() * tensor.element_size() for _, tensor in members),
            example=members[0][0],
        )
        for (kind, dtype, requires_grad), members in rows.items()
    ]
    return sorted(table, key=lambda row: (row.kind != "parameter", -row.size_bytes, row.example))


def format_dtype_table(rows: Sequence[DtypeRow]) -> str:
    """As text, one line a row."""
    header = ("kind", "dtype", "trained", "tensors", "elements", "MiB", "such as")
    cells = [
        (
            row.kind,
            str(row.dtype).removeprefix("torch."),
            "yes" if row.requires_grad else "no",
            f"{row.num_tensors:,}",
            f"{row.num_elements:,}",
            f"{row.size_bytes / 2**20:,.2f}",
            row.example,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
    to_the_right = (3, 4, 5)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in to_the_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *cells)
    )


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of each parameter and buffer by its name."""
    return {name: tensor.dtype for name, tensor in chain(model.named_parameters(), model.named_buffers())}


def changed_dtypes(before: Mapping[str, torch.dtype], model: nn.Module) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """What `dtypes_of` has another dtype for now: for each name, the earlier one and the present one."""
    return {
        name: (before[name], dtype)
        for name, dtype in dtypes_of(model).items()
        if name in before and before[name] != dtype
    }
