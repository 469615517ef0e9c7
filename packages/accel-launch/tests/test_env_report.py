from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from accel_launch import env_report
from accel_launch.cli import main
from accel_launch.env_report import describe_environment
from accel_state.config import LaunchSettings


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for heading in ("versions", "machine", "devices", "launcher", "settings from the launcher"):
        assert f"\n{heading}\n" in f"\n{text}"
    assert f"({sys.executable})" in text
    assert "accel-launch" in text


def test_launcher_and_settings_are_shown_with_their_sources() -> None:
    settings = LaunchSettings(values={"mixed_precision": "bf16"}, sources={"mixed_precision": "--mixed-precision"})
    report = describe_environment(
        {"RANK": "1", "WORLD_SIZE": "2", "ACCEL_RUN_CONFIG": settings.to_json(), "SECRET": "x"}
    )
    assert report["launcher"]["started by"] == "torchrun, rank 1 of 2"
    assert report["launcher"]["RANK"] == "1"
    assert "SECRET" not in report["launcher"]
    assert report["settings from the launcher"]["mixed_precision"] == "'bf16' (--mixed-precision)"


def test_a_broken_environment_is_reported_not_raised() -> None:
    report = describe_environment({"RANK": "x", "WORLD_SIZE": "2", "ACCEL_RUN_CONFIG": "{"})
    assert report["launcher"]["started by"].startswith("not clear: `RANK=x` is not a whole number")
    assert "is not JSON" in report["settings from the launcher"]["ACCEL_RUN_CONFIG"]


def test_torch_may_be_absent() -> None:
    code = "import sys; sys.modules['torch'] = None; from accel_launch.cli import main; sys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "torch  cannot be imported: " in done.stdout


def test_a_package_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_report, "_PACKAGES", ("no-such-package",))
    assert describe_environment({})["versions"]["no-such-package"] == "not installed"


def test_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--hlep"]) == 2
    assert "takes no arguments. Did you mean '--help'?" in capsys.readouterr().err
    assert main(["env", "--help"]) == 0


def test_cpu_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast One\n")
    assert env_report._cpu_name(tmp_path / "cpuinfo") == "Fast One"
    assert env_report._cpu_name(tmp_path / "none")
