"""Launches from a process that goes on living. Each test is a fresh interpreter, as a notebook's kernel is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from accel_launch import WorkerError, debug_launcher, notebook_launcher
from accel_state.errors import ConfigError
from accel_state.process import Process

CELL = """
import os, sys, time
import torch, torch.distributed as dist
from accel_launch import WorkerError, debug_launcher, notebook_launcher
from accel_state import ConfigError, LaunchSettings, Process
folder = sys.argv[1]
def write(name, text):
    with open(os.path.join(folder, name), "w") as file: file.write(text)
def train(scale):
    process = Process.current()
    weight = torch.ones(3, requires_grad=True)
    (weight * (process.topology.rank + 1)).sum().backward()
    dist.all_reduce(weight.grad)
    assert "RANK" not in os.environ
    assert torch.get_num_threads() == 1
    result = f"{weight.grad[0].item() * scale} {process.device} {process.environment.run_config}"
    write(f"rank{process.topology.rank}", result)
"""


def run_cell(launcher: Any, text: str) -> subprocess.CompletedProcess[str]:
    script = launcher.script(CELL + text, "cell.py")
    return subprocess.run(
        [sys.executable, script, str(launcher.folder)], env=launcher.env, capture_output=True, text=True, timeout=60
    )


def test_several_processes(launcher: Any) -> None:
    done = run_cell(launcher, "notebook_launcher(train, (10,), num_processes=3)\nassert not Process.is_open()")
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert (launcher.folder / f"rank{rank}").read_text() == "60.0 cpu None"


def test_precision_reaches_the_processes_without_the_environment(launcher: Any) -> None:
    done = run_cell(launcher, "notebook_launcher(train, (1,), num_processes=2, mixed_precision='bf16')")
    assert done.returncode == 0, done.stderr
    text = (launcher.folder / "rank1").read_text()
    assert '"mixed_precision": "bf16"' in text
    assert '"mixed_precision": "notebook_launcher"' in text


def test_debug_launcher_is_on_the_cpu_and_may_be_called_again(launcher: Any) -> None:
    done = run_cell(launcher, "debug_launcher(train, (1,))\ndebug_launcher(train, (2,), num_processes=2)")
    assert done.returncode == 0, done.stderr
    assert (launcher.folder / "rank0").read_text().startswith("6.0 cpu")
    assert '"device": "cpu"' in (launcher.folder / "rank0").read_text()


def test_work_of_the_parent_with_several_threads_does_not_hang_the_processes(launcher: Any) -> None:
    """OpenMP pools do not survive a fork."""
    done = run_cell(
        launcher,
        """
torch.set_num_threads(2)
(torch.rand(600, 600) @ torch.rand(600, 600)).exp()
def multiply():
    (torch.rand(600, 600) @ torch.rand(600, 600)).exp()
debug_launcher(multiply)
""",
    )
    assert done.returncode == 0, done.stderr


def test_a_failure_is_raised_with_its_traceback_and_the_others_are_ended(launcher: Any) -> None:
    done = run_cell(
        launcher,
        """
def fail():
    if Process.current().topology.rank == 1:
        raise KeyError("the cause")
    time.sleep(60)
try:
    debug_launcher(fail)
except WorkerError as error:
    assert error.rank == 1
    print(error)
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Rank 1 failed, and the others were stopped:\nTraceback")
    assert 'raise KeyError("the cause")' in done.stdout
    assert not launcher.alive()


def test_a_process_that_dies_or_exits_is_named(launcher: Any) -> None:
    done = run_cell(
        launcher,
        """
for end in (lambda: os.kill(os.getpid(), 9), lambda: os._exit(3), lambda: sys.exit(0)):
    def stop():
        if Process.current().topology.rank == 1: end()
        time.sleep(60)
    try:
        debug_launcher(stop)
    except WorkerError as error:
        print(error.rank, error.reason.splitlines()[-1])
""",
    )
    assert done.stdout.splitlines() == [
        "1 It was killed by SIGKILL, without a word of its own.",
        "1 It ended with exit code 3, without a word of its own.",
        "1 SystemExit: 0",
    ], done.stderr


def test_autograd_in_the_parent_works_or_is_explained(launcher: Any) -> None:
    """Only torch built for an accelerator starts autograd's threads, which do not survive a fork."""
    done = run_cell(
        launcher, "torch.ones(1, requires_grad=True).backward()\nnotebook_launcher(train, (1,), num_processes=2)"
    )
    if done.returncode == 0:
        assert (launcher.folder / "rank1").read_text() == "3.0 cpu None"
    else:
        assert "ConfigError: Autograd has run in this process" in done.stderr


def test_autograd_that_cannot_work_is_explained(launcher: Any) -> None:
    done = run_cell(
        launcher,
        """
def refuse(self, *args):
    raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")
torch.Tensor.backward = refuse
notebook_launcher(train, (1,), num_processes=2)
""",
    )
    assert "ConfigError: Autograd has run in this process: a cell has called `backward()`." in done.stderr
    assert "Restart the kernel" in done.stderr


def test_an_open_process_is_refused(launcher: Any) -> None:
    done = run_cell(launcher, "Process.open()\nnotebook_launcher(train, (1,), num_processes=2)")
    assert re.search(r"ConfigError: A process is open here already .*inside the launched function only", done.stderr)


def test_a_device_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"uses `cuda` already: a cell .*Restart the kernel, and touch devices only"):
        notebook_launcher(print, num_processes=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_parent_leaves_no_process(launcher: Any, number: signal.Signals) -> None:
    text = """
def wait():
    write(f"up{Process.current().topology.rank}", "")
    time.sleep(60)
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
debug_launcher(wait)
"""
    script = launcher.script(CELL + text, "cell.py")
    process = subprocess.Popen(
        [sys.executable, script, str(launcher.folder)], env=launcher.env, stderr=subprocess.PIPE, text=True
    )
    launcher.wait_for_files("up0", "up1")
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "KeyboardInterrupt"
    launcher.wait_for(lambda: not launcher.alive(), "end of every process", 10.0)


# One process is this one.


def test_one_process_is_this_one() -> None:
    kept: list[object] = []
    notebook_launcher(kept.append, (3,), num_processes=1)
    assert kept == [3]


def test_one_process_with_settings_opens_and_closes_a_process() -> None:
    seen: list[Any] = []
    notebook_launcher(
        lambda: seen.append(Process.current().environment.run_config), num_processes=1, mixed_precision="bf16"
    )
    debug_launcher(lambda: seen.append(Process.current().device.type), num_processes=1)
    assert '"mixed_precision": "bf16"' in seen[0]
    assert seen[1] == "cpu"
    assert not Process.is_open()


def test_one_process_with_settings_refuses_an_open_one() -> None:
    with Process.open(), pytest.raises(ConfigError, match=r"open here already .*inside the launched function"):
        notebook_launcher(print, num_processes=1, mixed_precision="bf16")


@pytest.mark.parametrize("count", [0, -1, True, "2"])
def test_counts(count: Any) -> None:
    with pytest.raises(ConfigError, match=r"`num_processes=.*` is not a count of at least one"):
        notebook_launcher(print, num_processes=count)


def test_an_unknown_precision() -> None:
    with pytest.raises(ConfigError, match=r"`mixed_precision='bf61'` \(notebook_launcher\).*Did you mean 'bf16'"):
        notebook_launcher(print, mixed_precision="bf61")  # type: ignore[arg-type]


def test_a_failure_reaches_this_process() -> None:
    """Here for coverage. Where another test has run autograd in this process, that is what it must say."""
    with pytest.raises((WorkerError, ConfigError), match=r"ZeroDivisionError|Autograd has run in this process"):
        debug_launcher(divide)


def divide() -> None:
    raise ZeroDivisionError
