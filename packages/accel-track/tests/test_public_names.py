"""The public names of the package, and that importing it stays light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import accel_track


def test_public_names() -> None:
    assert sorted(accel_track.__all__) == [
        "Fanout",
        "GeneralTracker",
        "JsonlTracker",
        "LogWith",
        "TRACKER_GROUP",
        "__version__",
        "config_form",
        "make_trackers",
        "read_metrics",
        "tracker_names",
    ]
    for name in accel_track.__all__:
        assert getattr(accel_track, name) is not None


def test_importing_does_not_load_torch() -> None:
    code = "import sys, accel_track; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "runs" / "digits" / "metrics.jsonl").exists()
