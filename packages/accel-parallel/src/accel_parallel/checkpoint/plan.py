"""Which files the tensors of an item become, and which rank writes each. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LARGEST_FILE_BYTES", "SMALLEST_FILE_BYTES", "PlannedFile", "index_name", "plan_files"]

SMALLEST_FILE_BYTES = 64 << 20
"""Less than this is not worth another file."""
LARGEST_FILE_BYTES = 1 << 30
"""More than this is cut, so that threads write several at once; a tensor is never cut."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file that is going to be written."""

    name: str
    writer: int
    """Rank that writes it."""
    tensors: tuple[str, ...]
    """By name."""


def index_name(item: str) -> str:
    """The file that says which tensor is in which file, where an item has several."""
    return f"{item}.safetensors.index.json"


def plan_files(
    item: str,
    groups: Sequence[tuple[Mapping[str, int], Sequence[int]]],
    *,
    smallest: int = SMALLEST_FILE_BYTES,
    largest: int = LARGEST_FILE_BYTES,
) -> list[PlannedFile]:
    """Cut an item into files of about the same size, those of each group dealt out to its writers in turn.

    The same on every rank that asks with the same arguments. Neighbours stay neighbours.

    Args:
        item: its name.
        groups: bytes of tensors by name, and the ranks that may write them. The very first rank writes all of it where
            that is little.
        smallest: bytes below which there is one file only.
        largest: bytes of a file, above which there are more.
    """
    groups = [(sizes, writers) for sizes, writers in groups if sizes]
    total = sum(sum(sizes.values()) for sizes, _ in groups)
    if len(groups) > 1 and total <= smallest:
        merged = {name: size for sizes, _ in groups for name, size in sizes.items()}
        groups = [(merged, groups[0][1])]
    parts: list[tuple[list[str], int]] = []
    for sizes, writers in groups:
        held = sum(sizes.values())
        count = max(min(len(writers), held // smallest), -(-held // largest), 1)
        cut = _cut(sizes, count)
        parts += [(names, writers[number % len(writers)]) for number, names in enumerate(cut)]
    return [
        PlannedFile(
            f"{item}.safetensors" if len(parts) == 1 else f"{item}-{number:05d}-of-{len(parts):05d}.safetensors",
            writer,
            tuple(names),
        )
        for number, (names, writer) in enumerate(parts, start=1)
    ]


def _cut(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """At most `count` runs of names; one goes where its middle lies, if all were laid end to end and cut equally."""
    total, filled = sum(sizes.values()), 0
    runs: dict[int, list[str]] = {}
    for name, size in sizes.items():
        place = (2 * filled + size) * count // (2 * total) if total else 0
        runs.setdefault(min(place, count - 1), []).append(name)
        filled += size
    return list(runs.values())
