"""Times and ranges of layers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from accel_bigmodel.placing.cost import PlaceUse
from accel_bigmodel.placing.plan import Plan

__all__ = ["format_seconds", "layers_text", "printable"]


def format_seconds(seconds: float) -> str:
    """Three digits with a unit."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of numbers that follow each other."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def printable(name: str) -> str:
    """A name from a file, with what a terminal would obey and XML forbids made visible."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)


def layers_text(plan: Plan, use: PlaceUse) -> str:
    """Ranges of names, and how many there are."""
    if not use.layers:
        return "-"
    names = [printable(layer.name) for layer in plan.chain.layers]
    told = [
        f"{names[first]}..{_ending(names[first], names[last])}" if last > first else names[first]
        for first, last in _runs(use.layers)
    ]
    if len(told) > 4:
        told = [*told[:2], "...", told[-1]]
    return f"{', '.join(told)} ({len(use.layers)})"


def _ending(first: str, last: str) -> str:
    """`last` without what it shares with `first`, if both are numbers of one list."""
    stem, _, number = last.rpartition(".")
    return number if stem and stem == first.rpartition(".")[0] and number.isdecimal() else last
