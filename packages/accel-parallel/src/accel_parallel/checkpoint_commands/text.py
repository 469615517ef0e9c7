"""Sizes, ages and tables, as people read them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["age_text", "size_text", "table"]

_UNITS = ("kB", "MB", "GB", "TB", "PB")
_AGES = (("day", 86400), ("hour", 3600), ("minute", 60))


def size_text(size_bytes: int) -> str:
    """A number of bytes in three digits, in powers of 1000 as disks are sold."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in _UNITS:
        size /= 1000
        if size < 999.5 or unit == _UNITS[-1]:
            break
    return f"{size:.{max(0, 2 - len(str(int(size))) + 1)}f} {unit}" if size < 999.5 else f"{size:.0f} {unit}"


def age_text(age_s: float) -> str:
    """How long ago, in its largest unit."""
    for name, seconds in _AGES:
        if age_s >= seconds:
            count = int(age_s // seconds)
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return "just now"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> list[str]:
    """Lines of aligned columns; those named in `right` are numbers."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [
            cell.rjust(width) if head in right else cell.ljust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
