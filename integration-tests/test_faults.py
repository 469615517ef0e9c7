"""What happens to a run when something goes wrong around it: signals, kills, a disk that is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from accel_parallel.checkpoint import latest_checkpoint

LAUNCH = [sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-processes", "2"]

TRAIN = """
import os, sys, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from accel import Accelerator

accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
data = DataLoader(TensorDataset(torch.randn(100_000, 4)), batch_size=2)
model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), data)
for step, (inputs,) in enumerate(data):
    optimizer.zero_grad()
    accelerator.backward(model(inputs).mean())
    optimizer.step()
    if step == 3:
        begun = Path(sys.argv[1], f"{accelerator.process_index}.tmp")
        begun.write_text(str(os.getpid()))
        begun.rename(begun.with_suffix(".pid"))
    time.sleep(0.01)
"""


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@contextmanager
def training(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A launched training that has begun, and the pids of its workers; nothing of it is left afterwards."""
    script = folder / "train.py"
    script.write_text(TRAIN)
    with (folder / "stderr").open("wb") as errors:
        launcher = subprocess.Popen(
            [*LAUNCH, str(script), str(folder)], stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while len(files := list(folder.glob("*.pid"))) < 2:
            assert launcher.poll() is None, (folder / "stderr").read_text()
            assert time.monotonic() < deadline, "the training had not begun after 60 s"
            time.sleep(0.02)
        yield launcher, [int(path.read_text()) for path in sorted(files)]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait(10)


def all_gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(lives(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_ctrl_c_ends_every_worker_within_two_seconds(tmp_path: Path) -> None:
    with training(tmp_path) as (launcher, pids):
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: to the launcher and its workers
        assert all_gone(pids, within_s=2.0)
        assert launcher.wait(5) == 130
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_ctrl_c_sent_to_the_launcher_alone(tmp_path: Path) -> None:
    with training(tmp_path) as (launcher, pids):
        launcher.send_signal(signal.SIGINT)
        assert all_gone(pids, within_s=2.0)
        assert launcher.wait(5) == 130


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_run(rank: int, tmp_path: Path) -> None:
    with training(tmp_path) as (launcher, pids):
        os.kill(pids[rank], signal.SIGKILL)
        assert launcher.wait(20) not in (0, None)
        assert all_gone(pids, within_s=2.0)
    assert f"accel launch: rank {rank} of 2 was killed by SIGKILL" in (tmp_path / "stderr").read_text()


def test_a_killed_launcher_leaves_no_worker(tmp_path: Path) -> None:
    with training(tmp_path) as (launcher, pids):
        launcher.kill()
        assert all_gone(pids, within_s=5.0)


FILL = """
import sys
from pathlib import Path
import torch
from accel import Accelerator, CheckpointError


def main():
    root = Path(sys.argv[1])
    accelerator = Accelerator(project_dir=root)
    model = accelerator.prepare(torch.nn.Linear(512, 512))  # one MiB
    accelerator.save_state()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    if accelerator.is_main_process:
        with (root / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state()
    except CheckpointError as error:
        accelerator.print(f"refused: {error}")
    left = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert left == ["checkpoint_0"], left
    assert accelerator.load_state() == root / "checkpoints" / "checkpoint_0"
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    if accelerator.is_main_process:
        (root / "filler").unlink()
    accelerator.wait_for_everyone()
    accelerator.print(accelerator.save_state().name)
    accelerator.end_training()


main()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk to fill")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(
    small_disk: Path, run_command: Callable[..., Any], tmp_path: Path
) -> None:
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    done = run_command([*LAUNCH, script, small_disk])
    refused, after = done.stdout.strip().splitlines()
    assert refused.startswith("refused: The checkpoint")
    assert "No space left on device" in refused
    assert "earlier ones are untouched." in refused
    assert after == "checkpoint_1"
    assert latest_checkpoint(small_disk / "checkpoints") == small_disk / "checkpoints" / "checkpoint_1"
