"""Starts real launches, each marked in its environment, so that a test that leaves a process behind fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accel_state.env import snapshot
from accel_state.testing import leak_guard

MARK = "ACCEL_LAUNCH_TEST"
TIMEOUT_S = 60.0
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "PYTHONUNBUFFERED")


guard = pytest.fixture(autouse=True)(leak_guard)


class Launcher:
    """Runs `accel launch` as a user would, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        base = {name: value for name, value in snapshot().items() if name not in _NOT_INHERITED}
        self.env = {**base, MARK: self.mark, "OMP_NUM_THREADS": "1"}

    def script(self, text: str, name: str = "script.py") -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def start(self, *words: str, command: str = "launch", **options: Any) -> subprocess.Popen[str]:
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **options,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "accel_launch", command, *words],
            env={**self.env, **options.pop("env", {})},
            cwd=options.pop("cwd", self.folder),
            start_new_session=True,
            preexec_fn=options.pop("preexec_fn", _heed_ctrl_c),
            **options,
        )

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **options)
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def alive(self) -> list[int]:
        """Processes of this test that live, zombies not counted."""
        return [pid for pid in _all_processes() if self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return f"{MARK}={self.mark}".encode() in environ and state != "Z"

    def wait_for(self, condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> float:
        """Seconds until `condition` holds."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > timeout_s:
                pytest.fail(f"After {timeout_s} s there was still no {what}; alive: {self.alive()}")
            time.sleep(0.01)
        return time.monotonic() - start

    def wait_for_files(self, *names: str) -> None:
        self.wait_for(lambda: all((self.folder / name).exists() for name in names), f"file {names}")


def _heed_ctrl_c() -> None:
    """A shell that runs tests in the background lets them ignore Ctrl-C, and the launcher respects that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    deadline = time.monotonic() + 5.0
    while (left := made.alive()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes {left} outlived the test"
