"""The plugin that every run of tests has: one that hangs where pytest-timeout cannot reach ends, and shows where."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from accel_state.testing import hangs

CASES = {
    "with the interpreter's lock": """\
import ctypes, pytest

@pytest.mark.timeout(1)
def test_hangs():
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # here
""",
    "in native code": """\
import ctypes, pytest

@pytest.mark.timeout(1)
def test_hangs():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # here
""",
    "after a failure": """\
import threading, pytest

@pytest.fixture
def given():
    yield
    threading.Event().wait()  # here

@pytest.mark.timeout(1)
def test_hangs(given):
    assert False
""",
    "after the last test": """\
import threading

def wait():
    threading.Event().wait()  # here

def test_passes():
    threading.Thread(target=wait).start()
""",
}


MANY = """\
import threading, pytest

@pytest.mark.timeout(0.2)
@pytest.mark.parametrize("number", range(9))
def test_hangs(number):
    threading.Event().wait()
"""


def run(tmp_path: Path, test: str) -> subprocess.CompletedProcess[str]:
    quick = re.sub(r"^(GRACE_S|EXIT_S) = .*", r"\1 = 1.0", Path(hangs.__file__).read_text(), flags=re.MULTILINE)
    (tmp_path / "conftest.py").write_text(quick)
    (tmp_path / "test_it.py").write_text(test)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=20", "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="locks a mutex of glibc twice")
@pytest.mark.parametrize("case", CASES)
def test_a_hang_ends_and_shows_where(case: str, tmp_path: Path) -> None:
    done = run(tmp_path, CASES[case])
    line = CASES[case].splitlines().index(next(each for each in CASES[case].splitlines() if "# here" in each)) + 1
    # An Event waits in the standard library, so the test's own frame is further down.
    assert re.search(rf'^  File ".*test_it.py", line {line} in ', done.stderr, re.MULTILINE), done.stdout + done.stderr
    assert "Timeout (0:00:0" in done.stderr
    assert done.returncode == 1


def test_a_few_hangs_end_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, MANY)
    assert "!! 3 tests hung, the last one was test_it.py::test_hangs[2] !!" in done.stdout, done.stdout + done.stderr
    assert "3 failed" in done.stdout
    assert done.returncode == 1
