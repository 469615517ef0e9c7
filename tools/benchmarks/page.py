"""The report: a table, the machine it was made on, and the page that shows both."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.compare import Outcome
from benchmarks.sides import NAMES, Side

__all__ = ["PAGE", "report", "write"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pages" / "benchmarks.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

_COLUMNS = ("accel", "accelerate", "fabric")


def report(outcomes: Iterable[Outcome], sides: dict[str, Side], *, rounds: int, repeats: int) -> str:
    """All rows as one Markdown table, below what it was measured with; peers have columns if there is any."""
    outcomes = list(outcomes)
    known = {*sides, *(name for outcome in outcomes for name in outcome.comparison.samplers)}
    columns = _COLUMNS if known & set(_COLUMNS[1:]) else _COLUMNS[:1]
    heads = ["", "what", "reference", *(NAMES[name] for name in columns), "accel is judged by", "goal", "met"]
    lines = [
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {_machine()}; {_versions(sides)}; {rounds} rounds of {repeats} turns.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    return "\n".join([*lines, *(_row(outcome, sides, columns) for outcome in outcomes)])


def write(text: str, page: Path = PAGE, *, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put a report into a page, between its two marks.

    Raises:
        ValueError: for a page without them.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{page} has no {marks[0]} with {marks[1]} below it. Put them where the table belongs.")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def _row(outcome: Outcome, sides: dict[str, Side], columns: Sequence[str]) -> str:
    comparison = outcome.comparison
    reference = next((name for name in outcome.times if name not in _COLUMNS), None)
    cells = [comparison.key, comparison.title, _time(outcome.times[reference]) if reference else ""]
    for name in columns:
        if name in outcome.times:
            cells.append(_time(outcome.times[name]))
        elif name in comparison.samplers:
            cells.append("failed")
        else:
            cells.append("-" if name in sides or comparison.key == "P14" else "not installed")
    low, high = outcome.spread
    show = _shower(outcome)
    cells.append(f"{show(outcome.against['accel'])} ({show(low)} to {show(high)})")
    cells += ["≤ " + show(comparison.goal), "yes" if outcome.meets_goal else "**no**"]
    return f"| {' | '.join(cells)} |"


def _shower(outcome: Outcome) -> Callable[[float], str]:
    kind = outcome.comparison.by
    if kind == "ratio":
        return "{:.2f} x".format
    return _time if kind == "time" else lambda value: f"{'+' if value >= 0 else '-'}{_time(abs(value))}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _versions(sides: dict[str, Side]) -> str:
    return ", ".join(f"{NAMES[name]} {side.version}" for name, side in sides.items())


def _machine() -> str:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"load average {load:.1f} at the end"
    )


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
