"""Which dtypes a model holds, as a table to print and to assert on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["DTypeRow", "dtype_table", "format_dtype_table"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DTypeRow:
    """Parameters or buffers of one dtype in one part of a model."""

    name: str
    """Fully qualified name of the submodule; empty for what the model holds itself."""
    kind: str
    """``"parameter"`` or ``"buffer"``."""
    dtype: str
    """Such as ``"float32"``."""
    num_tensors: int
    """Tensors of this row; a tied one is counted where it is met first."""
    num_trainable: int
    """How many of them require a gradient."""
    num_elements: int
    """Elements of all of them together."""


def dtype_table(model: torch.nn.Module, *, depth: int = 1) -> list[DTypeRow]:
    """One row for each part of `model`, kind and dtype, in the order in which they are met.

    Args:
        model: any module, also one on the meta device.
        depth: how many levels of submodules are told apart; 0 gives one part, the whole model.
    """
    counts: dict[tuple[str, str, str], list[int]] = {}
    tensors: list[tuple[str, str, torch.Tensor]] = [("parameter", *item) for item in model.named_parameters()]
    tensors += [("buffer", *item) for item in model.named_buffers()]
    for kind, name, tensor in tensors:
        part = ".".join(name.split(".")[:-1][:depth])
        row = counts.setdefault((part, kind, str(tensor.dtype).removeprefix("torch.")), [0, 0, 0])
        row[0] += 1
        row[1] += int(tensor.requires_grad)
        row[2] += tensor.numel()
    return [
        DTypeRow(name=name, kind=kind, dtype=dtype, num_tensors=row[0], num_trainable=row[1], num_elements=row[2])
        for (name, kind, dtype), row in counts.items()
    ]


def format_dtype_table(rows: list[DTypeRow]) -> str:
    """`rows` as aligned text, a line each under a heading."""
    cells = [("module", "kind", "dtype", "tensors", "trainable", "elements")]
    cells += [
        (
            row.name or "(root)",
            row.kind,
            row.dtype,
            str(row.num_tensors),
            str(row.num_trainable),
            f"{row.num_elements:,}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )
