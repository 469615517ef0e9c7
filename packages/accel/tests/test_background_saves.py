"""Saves in the background hold the moment they were asked for, fail aloud, and outlive the run."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, CheckpointError, ConfigError, FullyShardedDataParallelPlugin, ProjectConfiguration
from accel_parallel.checkpoint import Checkpoint
from accel_state import Process
from accel_state.process import ProcessSettings
from accel_state.testing import rank_environment, run_ranks

CPU = ProcessSettings(device="cpu")
KINDS = {
    "single": (1, {}),
    "ddp": (2, {}),
    "fsdp": (2, {"fsdp_plugin": FullyShardedDataParallelPlugin()}),
    "fsdp_full": (2, {"fsdp_plugin": FullyShardedDataParallelPlugin(state_dict_type="FULL_STATE_DICT")}),
}


def prepared(folder: Path, *, width: int = 7, **options: Any) -> tuple[Accelerator, Any, Any]:
    project = ProjectConfiguration(project_dir=folder, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=project, **options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return accelerator, model, optimizer


def step(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    rows = torch.randn(4, 5)
    accelerator.backward(model(rows).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def contents(folder: Path) -> dict[str, Any]:
    """All but the manifest, byte by byte."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def saved_both_ways(folder: str, kind: str) -> tuple[bool, bool, list[str]]:
    with Process.open(CPU, environment=rank_environment()) as process:
        accelerator, model, optimizer = prepared(Path(folder), **KINDS[kind][1])
        for _ in range(2):
            step(accelerator, model, optimizer)
        blocking = accelerator.save_state()
        pending = accelerator.save_state(blocking=False)
        for _ in range(3):
            step(accelerator, model, optimizer)  # must not be seen by what is being written
        written = Path(pending.wait())
        same = contents(blocking) == contents(written)
        # The memory is used again.
        again = Path(accelerator.save_state(blocking=False).wait())
        Checkpoint(again).verify()
        moved = contents(again) != contents(written)
        process.barrier()
        names = sorted(path.name for path in blocking.parent.iterdir())
        accelerator.end_training()
    return same, moved, names


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_written_is_the_moment_of_the_call(tmp_path: Path, kind: str) -> None:
    for same, moved, names in run_ranks(saved_both_ways, KINDS[kind][0], str(tmp_path), kind, open_process=False):
        assert same
        assert moved
        assert names == ["checkpoint_1", "checkpoint_2"]  # the limit holds in the background too


def test_one_at_a_time(alone: None, tmp_path: Path) -> None:
    accelerator, *_ = prepared(tmp_path)
    first = accelerator.save_state(blocking=False)
    second = accelerator.save_state(blocking=False, if_busy="skip")
    assert second is first or first.done
    third = accelerator.save_state(blocking=False)
    assert first.done
    assert third.path != first.path
    third.wait()
    assert third.done
    assert third.wait() == third.path  # as often as one likes
    with pytest.raises(ConfigError, match="`if_busy='queue'` is no way to treat a save"):
        accelerator.save_state(blocking=False, if_busy="queue")
    with pytest.raises(ConfigError, match="`if_busy='skip'` was given to a save that blocks"):
        accelerator.save_state(if_busy="skip")  # type: ignore[call-overload] # what is tested
    accelerator.end_training()


def test_a_busy_save_is_the_one_that_is_returned(alone: None, tmp_path: Path) -> None:
    accelerator, *_ = prepared(tmp_path, width=3_000_000)  # takes longer to write than to look
    first = accelerator.save_state(blocking=False)
    writer = first._writer._process.pid
    os.kill(writer, signal.SIGSTOP)
    assert accelerator.save_state(blocking=False, if_busy="skip") is first
    assert not first.done
    os.kill(writer, signal.SIGCONT)
    accelerator.end_training()
    assert first.done


def failing(folder: str, later: str) -> tuple[str, list[str], bool]:
    with Process.open(CPU, environment=rank_environment()) as process:
        accelerator, model, optimizer = prepared(Path(folder))
        accelerator.save_state(blocking=False).wait()
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if process.topology.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1]))  # its writer cannot even say that it failed
        accelerator.save_state(blocking=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        step(accelerator, model, optimizer)
        with pytest.raises(CheckpointError, match="could not be written") as caught:
            {
                "save": accelerator.save_state,
                "load": accelerator.load_state,
                "end": accelerator.end_training,
                "free": accelerator.free_memory,
            }[later]()
        if later in ("end", "free"):
            return str(caught.value), sorted(os.listdir(Path(folder, "checkpoints"))), True
        assert accelerator.load_state() == Path(folder, "checkpoints", "checkpoint_0")
        accelerator.save_state(blocking=False).wait()  # it was told once, and all is well again
        process.barrier()
        names = sorted(os.listdir(Path(folder, "checkpoints")))
        accelerator.end_training()
    return str(caught.value), names, False


def without_memory(folder: str) -> tuple[str, list[str]]:
    with Process.open(CPU, environment=rank_environment()) as process:
        accelerator, *_ = prepared(Path(folder))
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if process.topology.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1]))  # so that its memory cannot grow
        with pytest.raises(CheckpointError, match="bytes of host memory to copy to") as caught:
            accelerator.save_state(blocking=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        process.barrier()  # the main process clears up
        left = os.listdir(Path(folder, "checkpoints"))
        accelerator.save_state(blocking=False).wait()
        accelerator.end_training()
    return str(caught.value), left


def test_a_rank_without_memory_is_told_on_all(tmp_path: Path) -> None:
    one, two = run_ranks(without_memory, 2, str(tmp_path), open_process=False)
    assert one == two
    assert "rank 1: no " in one[0]
    assert one[1] == []


@pytest.mark.parametrize("later", ["save", "load", "end", "free"])
def test_a_failure_of_one_rank_is_raised_on_all_at_the_next_call(tmp_path: Path, later: str) -> None:
    answers = run_ranks(failing, 2, str(tmp_path), later, open_process=False)
    assert len({message for message, _, _ in answers}) == 1
    for message, names, ended in answers:
        assert "rank 1: OSError: " in message
        assert "earlier ones are untouched" in message
        assert names == (["checkpoint_0"] if ended else ["checkpoint_0", "checkpoint_1"])


def test_a_killed_writer_is_told(alone: None, tmp_path: Path) -> None:
    accelerator, *_ = prepared(tmp_path, width=3_000_000)
    accelerator.save_state()
    pending = accelerator.save_state(blocking=False)
    os.kill(pending._writer._process.pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match=r"process that wrote it ended with code -9\. Earlier ones are"):
        pending.wait()
    accelerator.save_state()
    assert sorted(os.listdir(tmp_path / "checkpoints"))[-2:] == ["checkpoint_0", "checkpoint_1"]
    accelerator.end_training()


SCRIPT = """
import os, signal, sys
import torch
from accel import Accelerator, ProjectConfiguration

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
accelerator = Accelerator(cpu=True, project_dir={folder!r})
model = torch.nn.Linear(2000, 500)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
accelerator.backward(model(torch.randn(2, 2000)).sum())
optimizer.step()
pending = accelerator.save_state(blocking=False)
{rest}
"""


def run_script(folder: Path, rest: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(SCRIPT).format(folder=str(folder), rest=rest)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("os._exit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_however_the_run_ends_what_was_begun_becomes_complete(tmp_path: Path, rest: str, code: int) -> None:
    done = run_script(tmp_path, rest)
    assert done.returncode == code, done.stderr
    folder = tmp_path / "checkpoints" / "checkpoint_0"
    deadline = time.monotonic() + 20
    while not folder.exists() and code < 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    while not folder.exists() and code == 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    Checkpoint(folder).verify()
    assert os.listdir(folder.parent) == ["checkpoint_0"]


def test_a_failure_that_nobody_waited_for_is_told_at_the_end(tmp_path: Path) -> None:
    done = run_script(tmp_path, "os.kill(pending._writer._process.pid, signal.SIGKILL)")
    assert done.returncode == 0
    assert "is not complete: the process that wrote it ended with code -9" in done.stderr
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_run_that_never_saves_so_loads_nothing_for_it(tmp_path: Path) -> None:
    code = (
        "import sys; from accel import Accelerator; accelerator = Accelerator(cpu=True); accelerator.end_training(); "
        "sys.exit('accel_parallel.checkpoint.background' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100, check=False).returncode == 0


def asked_to_stop(folder: str) -> tuple[int, bool]:
    with Process.open(CPU, environment=rank_environment()) as process:
        accelerator, model, optimizer = prepared(Path(folder))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(ConfigError, match=r"Call `catch_stop_signals\(\)` once"):
            accelerator.stop_requested()
        accelerator.catch_stop_signals()
        steps = 0
        while not accelerator.stop_requested():
            step(accelerator, model, optimizer)
            steps += 1
            if steps == 3 and process.topology.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert steps < 10
        accelerator.save_state()
        accelerator.end_training()
    return steps, signal.getsignal(signal.SIGTERM) == before


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    assert run_ranks(asked_to_stop, 2, str(tmp_path), open_process=False) == [(3, True), (3, True)]
    assert Checkpoint(tmp_path / "checkpoints" / "checkpoint_0").manifest.step == 3


def test_signals_that_cannot_be_caught_are_refused(alone: None, tmp_path: Path) -> None:
    accelerator, *_ = prepared(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match="cannot be caught"):
        accelerator.catch_stop_signals(signal.SIGTERM, signal.SIGKILL)
    assert signal.getsignal(signal.SIGTERM) == before
    accelerator.catch_stop_signals(signal.SIGUSR2)
    accelerator.catch_stop_signals(signal.SIGTERM)  # in place of the one before
    assert not accelerator.stop_requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert accelerator.stop_requested()
    assert signal.getsignal(signal.SIGTERM) == before  # a second one means it
    accelerator.end_training()


def test_an_interrupted_wait_leaves_the_memory_to_its_writer(alone: None, tmp_path: Path) -> None:
    accelerator, model, _ = prepared(tmp_path, width=3_000_000)
    first = accelerator.save_state(tmp_path / "first", blocking=False)
    before = model[0].weight[0, 0].item()
    writer = first._writer._process.pid
    os.kill(writer, signal.SIGSTOP)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        old = signal.signal(signal.SIGALRM, signal.default_int_handler)
        first.wait()
    signal.signal(signal.SIGALRM, old)
    os.kill(writer, signal.SIGCONT)
    with torch.no_grad():
        model[0].weight.fill_(before + 1)
    accelerator.save_state(tmp_path / "second", blocking=False).wait()
    weight = Checkpoint(tmp_path / "first").read("model")["0.weight"]
    assert weight[0, 0].item() == before
    assert not (weight == before + 1).all()
    assert (Checkpoint(tmp_path / "second").read("model")["0.weight"] == before + 1).all()
    assert first.wait() == tmp_path / "first"
    accelerator.end_training()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_to_the_whole_group_do_not_end_a_writer(alone: None, tmp_path: Path, number: int) -> None:
    """Sent while it starts, they are kept for when it can ignore them."""
    accelerator, *_ = prepared(tmp_path, width=1_000_000)
    pending = accelerator.save_state(blocking=False)
    writer = pending._writer._process.pid
    os.kill(writer, number)
    assert pending.wait() == tmp_path / "checkpoints" / "checkpoint_0"
    Checkpoint(tmp_path / "checkpoints" / "checkpoint_0").verify()
    accelerator.end_training()


def test_whatever_the_path_and_the_folder_hold(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path / "a path"])
    accelerator, *_ = prepared(Path("run"))
    pending = accelerator.save_state(blocking=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pending.wait()
    Checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint_0").verify()
    monkeypatch.chdir(tmp_path)
    accelerator.end_training()


def test_a_failure_is_raised_by_its_handle_as_often_as_it_is_asked(alone: None, tmp_path: Path) -> None:
    accelerator, *_ = prepared(tmp_path, width=3_000_000)
    pending = accelerator.save_state(blocking=False)
    os.kill(pending._writer._process.pid, signal.SIGKILL)
    for call in (accelerator.save_state, pending.wait, pending.wait):
        with pytest.raises(CheckpointError, match="ended with code -9"):
            call()
    accelerator.save_state(blocking=False)
    accelerator.end_training()
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_0"]


def skipping(folder: str) -> list[str]:
    """What happens to saves that may be skipped once the writer of rank 1 was killed."""
    found = []
    with Process.open(CPU, environment=rank_environment()) as process:
        accelerator, *_ = prepared(Path(folder))
        accelerator.save_state(blocking=False).wait()
        pending = accelerator.save_state(blocking=False)
        if process.topology.rank == 1:
            os.kill(pending._writer._process.pid, signal.SIGKILL)
            while not pending.done:
                time.sleep(0.01)
        process.barrier()
        for _ in range(3):
            found.append("told")
            with contextlib.suppress(CheckpointError):
                accelerator.save_state(blocking=False, if_busy="skip").wait()
                found[-1] = "saved"
        accelerator.end_training()
    return found


def test_a_save_that_cannot_end_is_told_and_not_waited_for(tmp_path: Path) -> None:
    one, two = run_ranks(skipping, 2, str(tmp_path), open_process=False)
    assert one == two
    assert one in (["told", "saved", "saved"], ["saved"] * 3)  # the writer may have been faster


def test_a_fork_of_the_run_has_nothing_to_wait_for(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        "if os.fork() == 0:\n    sys.exit(0)\nos.wait()\nprint(pending.wait())\naccelerator.end_training()",
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint_0" in done.stdout
    Checkpoint(tmp_path / "checkpoints" / "checkpoint_0").verify()


def test_the_process_is_closed_though_its_last_save_failed(tmp_path: Path) -> None:
    accelerator, *_ = prepared(tmp_path, width=3_000_000)
    pending = accelerator.save_state(blocking=False)
    os.kill(pending._writer._process.pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="ended with code -9"):
        accelerator.end_training()
    with Process.open(CPU):  # it is free
        pass
