"""A run of two processes that is killed and resumed again and again equals one that was left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOAK = [sys.executable, Path(__file__).parents[1] / "tools" / "soak.py"]


@pytest.mark.timeout(200)
def test_nobody_can_tell_that_a_run_was_killed_six_times(run_command: Callable[..., Any], tmp_path: Path) -> None:
    """Once in each way: `hatch run soak` does it two hundred times."""
    folder = tmp_path / "soak"
    done = run_command([*SOAK, "--kills", "6", "--within-s", "1", "--folder", folder], timeout_s=180)
    assert "verdict          passed" in done.stdout
    assert len(list(folder.glob("start-*.jsonl"))) == 6
    assert "Traceback" not in (folder / "last start.log").read_text()


@pytest.mark.timeout(150)
def test_the_soak_fails_where_generators_are_not_restored(run_command: Callable[..., Any], tmp_path: Path) -> None:
    words = ["--kills", "1", "--within-s", "4", "--spoil", "generators", "--folder", tmp_path / "soak"]
    done = run_command([*SOAK, *words], timeout_s=120, check=False)
    assert done.returncode == 1
    assert "WRONG: the final weights are " in done.stdout
    assert "verdict          failed (--seed 0)" in done.stdout
