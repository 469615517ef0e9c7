"""What the tests of several packages together share: commands with hard timeouts, and where heavy tests run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from accel_state.testing import leak_guard

APART = {Path(__file__).parent / name: name for name in ("heavy", "deepspeed")}
"""Folders whose files import third parties that live in an environment of their own, with the marker of each."""


guard = pytest.fixture(autouse=True)(leak_guard)
"""Fails a test that leaves a variable, a thread, a process, an open `Process` or a process group behind."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these folders out, unless ``-m`` asks for one."""
    marker = APART.get(collection_path)
    return True if marker is not None and marker not in (config.option.markexpr or "") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in such a folder has its marker; nobody has to remember it."""
    for item in items:
        for folder, marker in APART.items():
            if folder in item.path.parents:
                item.add_marker(marker)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is left out and how to run it."""
    if any(marker in (config.option.markexpr or "") for marker in APART.values()):
        return None
    return (
        "integration-tests/heavy, integration-tests/deepspeed: not here, run them by `hatch run integration:test` and "
        "`hatch run deepspeed:test`"
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that has ended."""

    returncode: int
    """As a shell would give it, negative for a signal."""
    stdout: str
    stderr: str
    seconds: float


def _alive_in_group(group: int) -> list[str]:
    """The processes of a group that still run, as ``pid: command line``. Needs /proc; empty elsewhere."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(f"{stat.parent.name}: {command.strip()}")
    return found


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@pytest.fixture
def run_command(tmp_path: Path) -> Callable[..., Finished]:
    """Run a command in a process group of its own, and leave nothing of it behind.

    ``run_command(command, timeout_s=60, check=True, env=None, cwd=None)`` returns a `Finished`. It fails the test where
    the command does not end in time (its whole group is killed), where it ends with another code than 0 and `check`
    was not ``False``, and where a process of its group still runs two seconds after it. `env` is added to the
    environment; `cwd` is an empty folder by default.
    """
    count = 0

    def run(
        command: Sequence[str | Path],
        *,
        timeout_s: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Finished:
        nonlocal count
        count += 1
        folder = tmp_path / f"command{count}"
        (folder / "work").mkdir(parents=True)
        out, err = folder / "stdout", folder / "stderr"
        words = [str(word) for word in command]
        begin = time.monotonic()
        # Files and not pipes: a pipe stays open as long as any grandchild does.
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                words,
                cwd=cwd or folder / "work",
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        said = f"`{' '.join(words)}`"
        try:
            code = process.wait(timeout_s)
            deadline = time.monotonic() + 2.0
            while (left := _alive_in_group(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.02)
            if left:
                pytest.fail(f"{said} ended with {code} and left processes behind: {left}\n{_text(out)}\n{_text(err)}")
        except subprocess.TimeoutExpired:
            pytest.fail(f"{said} had not ended after {timeout_s:g} s\n{_text(out)}\n{_text(err)}")
        finally:
            _end_group(process.pid)
            process.wait(10)
        done = Finished(returncode=code, stdout=_text(out), stderr=_text(err), seconds=time.monotonic() - begin)
        if check and code:
            pytest.fail(f"{said} ended with {code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}")
        return done

    return run


@pytest.fixture
def accel_command() -> list[str]:
    """The words that start the ``accel`` command of this environment."""
    return [str(Path(sys.executable).with_name("accel"))]
