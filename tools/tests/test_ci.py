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
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("bash", "timeout", "ps", "xargs"))),
    reason="looks for processes left behind in /proc, with bash, timeout, ps and xargs",
)


def run(tmp_path: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    stand_in = tmp_path / "hatch"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    return subprocess.run(
        [ROOT / ".ci" / "run", *steps],
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


def test_every_step_is_a_script_of_hatch_and_has_a_limit() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    steps = re.findall(r'^    "([a-z]+)\|(\d+)\|hatch run ([\w:-]+)"$', text, re.MULTILINE)
    assert [name for name, _, _ in steps] == [
        "test",
        "matrix",
        "integration",
        "lint",
        "types",
        "imports",
        "alone",
        "docs",
    ]
    assert steps[0][2] == "test", "the first step is the README's test command"
    assert "&& hatch run test " in (ROOT / "README.md").read_text()
