"""`accel checkpoint` as users run it, on what an `Accelerator` wrote and for one to go on from."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accel import Accelerator, CheckpointError, ProjectConfiguration
from accel_parallel.checkpoint_commands import main

COMMAND = [sys.executable, "-m", "accel_launch", "checkpoint"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 2))


def saved_run(project: Path, count: int) -> None:
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=project))
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for _ in range(count):
        accelerator.backward(model(torch.randn(3, 4)).sum())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state()
    accelerator.end_training()


def test_a_run_is_listed_proved_compared_and_exported(tmp_path: Path, run_command: Callable[..., Any]) -> None:
    saved_run(tmp_path / "run", 3)
    listed = json.loads(run_command([*COMMAND, "ls", tmp_path / "run", "--json"]).stdout)
    assert [(each["name"], each["step"], each["is_latest"]) for each in listed] == [
        ("checkpoint_0", 1, False),
        ("checkpoint_1", 2, False),
        ("checkpoint_2", 3, True),
    ]
    shelf = tmp_path / "run" / "checkpoints"
    assert run_command([*COMMAND, "verify", shelf / "checkpoint_0", tmp_path / "run"]).stdout.count("as written") == 2
    compared = run_command([*COMMAND, "diff", shelf / "checkpoint_0", shelf / "checkpoint_1"], check=False)
    assert compared.returncode == 1
    assert "steps_taken: 1 in A, 2 in B" in compared.stdout
    run_command([*COMMAND, "consolidate", tmp_path / "run", tmp_path / "out"])
    model = network()
    from safetensors.torch import load_model

    load_model(model, tmp_path / "out" / "model.safetensors")
    (shelf / "checkpoint_2" / "model.safetensors").write_bytes(b"")
    assert run_command([*COMMAND, "verify", tmp_path / "run"], check=False).returncode == 1
    wrong = run_command([*COMMAND, "verifi", tmp_path], check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "accel: `accel checkpoint verifi` is not a command. Did you mean 'verify'?" in wrong.stderr


def test_an_interrupt_while_it_asks_removes_nothing(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", 2)
    ours, theirs = pty.openpty()
    try:
        command = [*COMMAND, "prune", str(tmp_path / "run"), "--keep", "1"]
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            shown = b""
            while b"[y/N]" not in shown:
                shown += os.read(process.stdout.fileno(), 1000)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
            assert b"Traceback" not in process.stderr.read()
    finally:
        os.close(ours)
        os.close(theirs)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["checkpoint_0", "checkpoint_1"]


def steps(model: Any, optimizer: Any, scheduler: Any, backward: Callable[..., Any], count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(torch.randn(6, 4)).pow(2).mean()
        backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def write_accelerate(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """As accelerate 1.15's `save_state(safe_serialization=False)` does."""
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save(scheduler.state_dict(), folder / "scheduler.bin")
    generators = {
        "step": 0,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    torch.save(generators, folder / "random_states_0.pkl")


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, list[float], float]:
    """A folder as of accelerate, and how its run went on: losses and the last learning rate."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    steps(model, optimizer, scheduler, torch.Tensor.backward, 3)
    write_accelerate(tmp_path / "old", model, optimizer, scheduler)
    losses = steps(model, optimizer, scheduler, torch.Tensor.backward, 4)
    return tmp_path / "old", losses, optimizer.param_groups[0]["lr"]


def test_a_run_of_accelerate_goes_on_bit_by_bit(old: tuple[Path, list[float], float], tmp_path: Path) -> None:
    folder, losses, rate = old
    target = tmp_path / "run" / "checkpoints" / "checkpoint_0"
    assert main(["convert", str(folder), str(target)]) == 0
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=tmp_path / "run"))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert accelerator.load_state() == target
    assert steps(model, optimizer, scheduler, accelerator.backward, 4) == losses
    assert optimizer.param_groups[0]["lr"] == rate
    accelerator.end_training()


def test_a_loader_that_it_lacks_is_waived_by_name(
    old: tuple[Path, list[float], float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, *_ = old
    main(["convert", str(folder), str(tmp_path / "new")])
    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = torch.utils.data.DataLoader(torch.zeros(8, 4), batch_size=2)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    with pytest.raises(CheckpointError, match=r"lacks loader"):
        accelerator.load_state(tmp_path / "new")
    accelerator.load_state(tmp_path / "new", strict=False)
    assert "`loader` is not in the checkpoint, and stays as it is" in caplog.text
    saved = torch.load(folder / "pytorch_model.bin", weights_only=True)
    held = accelerator.unwrap_model(model).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in held.items())
    accelerator.end_training()
