"""The main job, started in every way that the documents name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from accel_parallel.checkpoint import Checkpoint

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
QUICKSTART = EXAMPLES / "quickstart.py"
HELD_OUT = 359
TRAINED = 1438
BATCH = 32

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
LAUNCH = [sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-processes"]
WAYS = {
    "python": (1, [sys.executable]),
    "torchrun": (2, [*TORCHRUN, "--nproc-per-node", "2"]),
    "accel launch on 1": (1, [*LAUNCH, "1"]),
    "accel launch on 2": (2, [*LAUNCH, "2"]),
    "accel launch on 4": (4, [*LAUNCH, "4"]),
}


def finish(done: Any, folder: Path, *, num_processes: int, epochs: int) -> dict[str, float]:
    """Check what a run left behind, and return what it printed last."""
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    steps = epochs * -(-TRAINED // (BATCH * num_processes))
    (metrics,) = folder.rglob("metrics.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, steps + 1))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == sorted(f"checkpoint_{epoch}" for epoch in range(epochs))
    last = Checkpoint(folder / "checkpoints" / f"checkpoint_{epochs - 1}")
    assert (last.manifest.step, last.manifest.world_size) == (steps, num_processes)
    return result


@pytest.mark.parametrize("way", WAYS)
def test_the_quickstart_reads_digits_however_it_is_started(
    way: str, run_command: Callable[..., Any], tmp_path: Path
) -> None:
    num_processes, words = WAYS[way]
    # Larger worlds take fewer steps an epoch: all end after about as many steps.
    epochs = {1: 6, 2: 10, 4: 20}[num_processes]
    done = run_command([*words, QUICKSTART, "--project-dir", tmp_path / "run", "--epochs", str(epochs)], timeout_s=100)
    result = finish(done, tmp_path / "run", num_processes=num_processes, epochs=epochs)
    assert result["evaluated"] == HELD_OUT
    assert result["accuracy"] >= 0.97
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1  # one process speaks


@pytest.mark.timeout(200)
def test_a_killed_run_resumes_to_the_same_losses(run_command: Callable[..., Any]) -> None:
    done = run_command([sys.executable, EXAMPLES / "prove_resume.py"], timeout_s=180)
    assert f"images evaluated   {HELD_OUT} of {HELD_OUT}, each exactly once" in done.stdout
    assert "all equal to the undisturbed run's" in done.stdout


@pytest.mark.parametrize("same_folder", [False, True], ids=["folders of their own", "one folder"])
def test_two_launched_at_once(same_folder: bool, run_command: Callable[..., Any], tmp_path: Path) -> None:
    """Neither port nor file of one gets in the other's way. In one folder both write checkpoints under free numbers."""
    folders = [tmp_path / "one", tmp_path / ("one" if same_folder else "other")]
    _, words = WAYS["accel launch on 2"]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                run_command, [*words, QUICKSTART, "--project-dir", folder, "--epochs", "2"], timeout_s=100, check=False
            )
            for folder in folders
        ]
        answers = [run.result() for run in runs]
    for done, folder in zip(answers, folders, strict=True):
        assert done.returncode == 0, done.stderr
        if not same_folder:
            assert finish(done, folder, num_processes=2, epochs=2)["evaluated"] == HELD_OUT
        for path in (folder / "checkpoints").glob("checkpoint_*"):
            complete = Checkpoint(path)
            assert all(complete.read(item) is not None for item in complete.items)
