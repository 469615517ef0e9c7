"""The strategy of a third package that the docs show is found by its entry point and keeps the contract."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "own_strategy" / "all_reduce_strategy.py"
PAGE = Path(__file__).parents[1] / "docs" / "pages" / "own-strategy.md"

CHECK = """
from accel_parallel.testing import SCENARIOS, check_contract

if __name__ == "__main__":
    few = [each for each in SCENARIOS if each.name in ("mean", "items", "mean, two models apart", "mean, skipped")]
    check_contract("all_reduce", world_sizes=(2,), scenarios=few)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package, as an installer leaves it."""
    information = tmp_path / "all_reduce_strategy-0.1.dist-info"
    information.mkdir()
    shutil.copy(EXAMPLE, tmp_path)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: all-reduce-strategy\nVersion: 0.1\n")
    entry = '[accel.strategies]\nall_reduce = "all_reduce_strategy:AllReduceStrategy"\n'
    assert entry.replace("[accel", '[project.entry-points."accel').replace("]\n", '"]\n') in PAGE.read_text()
    (information / "entry_points.txt").write_text(entry.replace('"', ""))
    return tmp_path


def test_it_keeps_the_contract(installed: Path, run_command: Any) -> None:
    script = installed / "check.py"
    script.write_text(CHECK)
    run_command([sys.executable, script], timeout_s=100, env={**os.environ, "PYTHONPATH": str(installed)})


def test_the_page_shows_the_example() -> None:
    assert EXAMPLE.read_text().rstrip() in PAGE.read_text()
    assert len(EXAMPLE.read_text().splitlines()) < 50
