"""The example of the documents that learns from real text: read in three ways, stopped in the middle, and resumed."""

from __future__ import annotations

import json
import sys
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

CORPUS = Path(__file__).parents[2] / "docs" / "examples" / "corpus.py"
BATCH_SIZE = 16
SMALL = ["--modules", "10", "--length", "64", "--batch-size", str(BATCH_SIZE)]


@pytest.fixture
def train(accel_command: list[str], run_command: Callable[..., Any]) -> Callable[..., list[str]]:
    """Run the example, on so many processes and with such words; returns the lines of its standard output."""

    def run(folder: Path, num_processes: int, *words: str | int) -> list[str]:
        launch = [*accel_command, "launch", "--cpu", "--num-processes", str(num_processes)]
        given = [str(word) for word in words]
        done = run_command(
            [*launch, CORPUS, "--project-dir", folder, *SMALL, *given], timeout_s=100, env={"OMP_NUM_THREADS": "1"}
        )
        assert "Traceback" not in done.stderr
        return done.stdout.strip().splitlines()

    return run


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    """What was logged of each step; the later line holds."""
    steps = {}
    for line in (folder / "corpus" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entry.pop("time")
        steps[entry["step"]] = {**entry, "passages": literal_eval(entry["passages"])}
    return steps


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("how", "num_processes"), [("map", 1), ("map", 2), ("streaming", 1), ("streaming", 2), ("dispatch", 2)]
)
def test_a_stopped_run_goes_on_to_the_same_losses(
    how: str, num_processes: int, train: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    said = train(whole, num_processes, "--read", how)
    first, second = (json.loads(line) for line in said[1:])
    corpus = json.loads((whole / "corpus" / "corpus.json").read_text())
    assert first["passages"] == second["passages"] == corpus["passages"] > 500
    assert second["last_loss"] < first["first_loss"] - 1
    expected = steps_of(whole)
    assert sum(step["tokens"] for step in expected.values()) == 2 * (corpus["tokens"] - corpus["passages"])

    stop = len(expected) * 3 // 4  # in the middle of the second epoch
    said = train(stopped, num_processes, "--read", how, "--stop-after", stop)
    assert said[-1].startswith(f"stopped after step {stop}, ")
    moved = copytree(stopped, tmp_path / "moved")
    said = train(stopped, num_processes, "--read", how)
    assert f"going on after step {stop}, in epoch 1" in said
    assert steps_of(stopped) == expected

    if num_processes == 2 and how != "dispatch":  # and on one process, with the same global batch
        said = train(moved, 1, "--read", how, "--batch-size", 2 * BATCH_SIZE)
        assert json.loads(said[-1])["passages"] == corpus["passages"]
        found = steps_of(moved)
        for step, entry in expected.items():
            assert found[step]["passages"] == entry["passages"]
            assert found[step]["loss"] == pytest.approx(entry["loss"], rel=1e-4)


def test_its_help_teaches(run_command: Callable[..., Any]) -> None:

    said = " ".join(run_command([sys.executable, CORPUS, "--help"], timeout_s=60).stdout.split())
    for words in ("each process reads its own Parquet files", "as if time was up", "goes on where the last checkpoint"):
        assert words in said
