"""Metrics through the `Accelerator`, and the explanation of its settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from accel import Accelerator, ConfigError
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks


def log(folder: str) -> tuple[str, list[str]]:
    """On a rank: log two steps. Returns the kind of tracker that it got, and the files."""
    accelerator = Accelerator(cpu=True, project_dir=folder, log_with="jsonl")
    accelerator.init_trackers("digits", config={"lr": 0.1})
    for step in range(2):
        accelerator.log({"loss": step + 0.5, "rank": accelerator.process_index}, step=step)
    kind = type(accelerator.get_tracker("jsonl")).__name__
    accelerator.get_tracker("jsonl").log({"extra": 1}, step=2)
    accelerator.end_training()
    return kind, sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    (main, files), (other, _) = run_ranks(log, 2, str(tmp_path), settings=ProcessSettings(device="cpu"))
    assert (main, other) == ("JsonlTracker", "SilentTracker")
    assert "metrics.jsonl" in files
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(row["step"], row.get("loss"), row.get("rank")) for row in rows] == [
        (0, 0.5, 0),
        (1, 1.5, 0),
        (2, None, None),
    ]


def test_a_tracker_that_was_not_asked_for(alone: None, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl")
    with pytest.raises(ConfigError, match="'wandb'"):
        accelerator.get_tracker("wandb")


def test_every_setting_is_explained_with_its_source(alone: None, tmp_path: Path) -> None:
    text = Accelerator(cpu=True, project_dir=tmp_path, gradient_accumulation_steps=4).explain()
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["gradient_accumulation_steps"].split(None, 2) == [
        "gradient_accumulation_steps",
        "4",
        "argument of Accelerator",
    ]
    assert lines["mixed_precision"].split(None, 2)[1:] == ["'no'", "default"]
    assert str(tmp_path) in lines["project_dir"]
    for name in ("device", "backend", "timeout_s", "check_collectives"):
        assert name in lines
    assert "strategy: single, chosen for 1 process(es)" in text
    assert "Process(rank 0 of 1, cpu, NO, launcher none)" in text


def test_settings_of_the_launcher_are_explained_with_their_flags(tmp_path: Path) -> None:
    script = tmp_path / "explain.py"
    script.write_text(
        "from accel import Accelerator\n"
        "accelerator = Accelerator(gradient_accumulation_steps=2)\n"
        "accelerator.print(accelerator.explain())\n"
        "accelerator.end_training()\n"
    )
    words = [
        sys.executable,
        "-m",
        "accel_launch",
        "launch",
        "--cpu",
        "--num-processes",
        "2",
        "--mixed-precision",
        "bf16",
    ]
    words += ["--gradient-accumulation-steps", "8", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert lines["mixed_precision"].split(None, 2)[1:] == ["'bf16'", "--mixed-precision"]
    assert lines["device"].split(None, 2)[1:] == ["'cpu'", "--cpu"]
    assert "argument of Accelerator, over --gradient-accumulation-steps=8" in lines["gradient_accumulation_steps"]
    assert "strategy: ddp, chosen for 2 process(es)" in done.stdout
    assert done.stdout.count("precision: bf16") == 1  # the main process's alone
