"""``.ci/run`` with a stand-in for hatch: what it does when steps fail or leave processes behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT

STAND_IN = """\
#!{python}
import os, signal, subprocess, sys
print("hatch", *sys.argv[1:], flush=True)
if sys.argv[1:] == ["run", "types"]:
    sys.exit(3)
if sys.argv[1:] == ["run", "imports"]:
    subprocess.Popen(["sleep", "321"], start_new_session=True)
if sys.argv[1:] == ["run", "docs:build"]:
    print("SIGINT is the interpreter's:", signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
    print("stdin is empty:", sys.stdin.read() == "", flush=True)
if sys.argv[1:] == ["run", "matrix"]:
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_hangs.py"]).returncode)
"""

HANGS = """\
import ctypes

def test_hangs():
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("bash", "timeout", "ps", "xargs"))),
    reason="looks for processes left behind in /proc, with bash, timeout, ps and xargs",
)


def run(tmp_path: Path, *steps: str, script: Path = ROOT / ".ci" / "run") -> subprocess.CompletedProcess[str]:
    stand_in = tmp_path / "hatch"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    return subprocess.run(
        [script, *steps],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_failure_is_remembered_and_later_steps_run(tmp_path: Path) -> None:
    done = run(tmp_path, "lint", "types", "docs")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed first: types; failed: types" in done.stdout
    assert re.search(r"^lint +ok +\d+ s$", done.stdout, re.MULTILINE)
    assert re.search(r"^types +FAILED \(3\) +\d+ s$", done.stdout, re.MULTILINE)
    assert re.search(r"^docs +ok +\d+ s$", done.stdout, re.MULTILINE)
    assert "SIGINT is the interpreter's: True" in done.stdout
    assert "stdin is empty: True" in done.stdout


def test_process_left_behind_is_ended_and_fails_its_step(tmp_path: Path) -> None:
    done = run(tmp_path, "imports")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^imports +LEFT PROCESSES +\d+ s$", done.stdout, re.MULTILINE)
    listed = re.search(r"^ *(\d+) .* sleep 321$", done.stdout, re.MULTILINE)
    assert listed is not None, done.stdout
    state = Path(f"/proc/{listed[1]}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_at_the_limit_tests_say_where_they_are(tmp_path: Path) -> None:
    copy = tmp_path / "copy" / ".ci" / "run"
    copy.parent.mkdir(parents=True)
    copy.write_text(re.sub(r'"matrix\|\d+\|', '"matrix|12|', (ROOT / ".ci" / "run").read_text()))
    copy.chmod(0o755)
    (tmp_path / "copy" / "test_hangs.py").write_text(HANGS)
    done = run(tmp_path, "matrix", script=copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^matrix +TIMED OUT +\d+ s$", done.stdout, re.MULTILINE)
    assert re.search(r'test_hangs.py", line 6 in test_hangs$', done.stderr, re.MULTILINE), done.stderr
    assert "left behind" not in done.stdout


def test_every_step_is_a_script_of_hatch_and_has_a_limit() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    steps = re.findall(r'^    "([a-z]+)\|(\d+)\|hatch run ([\w:-]+)(?: -v)?"$', text, re.MULTILINE)
    assert [name for name, _, _ in steps] == [
        "test",
        "matrix",
        "integration",
        "deepspeed",
        "lint",
        "types",
        "imports",
        "alone",
        "docs",
    ]
    assert steps[0][2] == "test", "the first step is the README's test command"
    assert "&& hatch run test " in (ROOT / "README.md").read_text()
