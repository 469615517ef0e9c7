"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from accel_parallel.auto.cost import StepTime
from accel_parallel.auto.memory import Memory

__all__ = ["aligned", "gib", "largest_parts", "seconds", "time_parts"]

_MEMORY_NAMES = {
    "optimizer": "optimizer states",
    "gathered": "gathered units",
    "copies": "copies in lower precision",
    "logits": "logits and loss",
    "buckets": "DDP's buckets",
    "communication": "buffers of collectives",
}
_TIME_NAMES = {
    "compute_s": "compute",
    "recompute_s": "computing again",
    "gather_s": "exposed all-gathers",
    "scatter_s": "exposed reduce-scatters",
    "reduce_s": "exposed all-reduces",
    "tensor_s": "tensor-parallel all-reduces",
    "offload_s": "exposed copies to and from the host",
    "optimizer_s": "optimizer",
    "copy_s": "copies into and out of buffers",
    "overhead_s": "overhead",
}


def gib(size_bytes: float) -> str:
    """Bytes in GiB, or in MiB where that is little."""
    if size_bytes < 0.1 * 2**30:
        return f"{size_bytes / 2**20:,.1f} MiB"
    return f"{size_bytes / 2**30:,.1f} GiB"


def seconds(value: float) -> str:
    """Seconds, or milliseconds where that is little."""
    return f"{value:,.2f} s" if value >= 1 else f"{1000 * value:,.1f} ms"


def largest_parts(memory: Memory, *, limit: int = 3) -> str:
    """The parts that take most."""
    parts = sorted(memory.parts(), key=lambda part: -part[1])[:limit]
    return ", ".join(f"{_MEMORY_NAMES.get(name, name)} {gib(size)}" for name, size in parts if size > 0)


def time_parts(time: StepTime) -> dict[str, float]:
    """Seconds a sample by the name that people read."""
    return {_TIME_NAMES[name]: value / time.samples for name, value in time.parts()}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
