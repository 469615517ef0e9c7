"""Coverage of each package's sources, and the floors that some of them must keep. Last step of ``hatch run cov``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from repository import ROOT, packages

__all__ = ["Row", "below_floor", "rows"]

FLOOR_PERCENT = 90.0
FLOORS = (
    "packages/accel-state/src/*",
    "packages/accel-data/src/*",
    "packages/accel-parallel/src/accel_parallel/accumulation.py",
    "packages/accel-parallel/src/accel_parallel/checkpoint/*",
)
"""Groups of files of which at least `FLOOR_PERCENT` of the lines must be run."""


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    name: str
    lines: int
    """Lines that can be run."""
    covered: int
    """Lines that were."""

    @property
    def percent(self) -> float:
        """Covered part in percent; a group without lines is covered."""
        return 100.0 * self.covered / self.lines if self.lines else 100.0

    def __str__(self) -> str:
        return f"{self.name:<64} {self.lines:>6} lines {self.percent:6.1f} %"


def rows(files: dict[str, Any], patterns: tuple[str, ...]) -> list[Row]:
    """Sum the files of a coverage report (its ``files`` object) over each pattern."""
    found = []
    for pattern in patterns:
        summaries = [data["summary"] for file, data in files.items() if fnmatch(file, pattern)]
        lines = sum(each["num_statements"] for each in summaries)
        found.append(Row(pattern, lines, sum(each["covered_lines"] for each in summaries)))
    return found


def below_floor(floors: list[Row]) -> list[str]:
    """What is wrong with the groups that have a floor: too little run, or no such file."""
    found = []
    for row in floors:
        if row.lines == 0:
            found.append(f"{row.name}: matches no file that was measured")
        elif row.percent < FLOOR_PERCENT:
            found.append(f"{row.name}: {row.percent:.1f} %, at least {FLOOR_PERCENT:.0f} % wanted")
    return found


def main() -> int:
    """Print files, packages and floors; 1 if a floor was missed."""
    report = ROOT / ".coverage-report.json"
    command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(report)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, stdin=subprocess.DEVNULL)
    files = {_relative(name): data for name, data in json.loads(report.read_text())["files"].items()}
    report.unlink()
    for file, data in sorted(files.items()):
        print(Row(file, data["summary"]["num_statements"], data["summary"]["covered_lines"]), _missing(data))
    print()
    for row in rows(files, tuple(f"packages/{name}/src/*" for name in packages())):
        print(row)
    print()
    floors = rows(files, FLOORS)
    for row in floors:
        print(row, f"(floor {FLOOR_PERCENT:.0f} %)")
    wrong = below_floor(floors)
    for line in wrong:
        print(f"coverage: {line}")
    return 1 if wrong else 0


def _relative(name: str) -> str:
    path = Path(name)
    return str(path.relative_to(ROOT)) if path.is_absolute() else str(path)


def _missing(data: dict[str, Any], limit: int = 8) -> str:
    lines = data["missing_lines"]
    shown = " ".join(map(str, lines[:limit]))
    return f"not run: {shown}{' ...' if len(lines) > limit else ''}" if lines else ""


if __name__ == "__main__":
    sys.exit(main())
