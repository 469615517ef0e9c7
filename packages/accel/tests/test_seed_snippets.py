"""The loops, names and launch lines that users of such libraries write, with `accel` in their place.

Each is run in the forms that the reference documents show: with and without placing tensors by hand, with a scheduler,
from a notebook's function, and by every launcher.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from accel import Accelerator
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

SMALL = {"d_model": 8, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 16}


class Sentences(Dataset[Any]):
    """Pairs of embedded sentences, and for each position a distribution over eight words."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(5, 8, generator=generator), torch.rand(5, 8, generator=generator).softmax(-1)


def load_dataset(name: str) -> Dataset[Any]:
    """In the place of a library that downloads one."""
    assert name == "some_dataset"
    return Sentences()


def transformer_loop(place_by_hand: bool) -> tuple[float, float, str]:
    """On a rank: losses of the first and last epoch, and the wrapped model's type."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    device = accelerator.device
    network = torch.nn.Transformer(**SMALL, dropout=0.0, batch_first=True)
    if place_by_hand:
        network = network.to(device)
    optim = torch.optim.Adam(network.parameters())
    pairs = DataLoader(load_dataset("some_dataset"), shuffle=True)
    network, optim, pairs = accelerator.prepare(network, optim, pairs)
    network.train()
    means = []
    for _ in range(10):
        total = 0.0
        for sentence, wanted in pairs:
            if place_by_hand:
                sentence, wanted = sentence.to(device), wanted.to(device)
            optim.zero_grad()
            said = network(sentence, sentence)
            loss = F.cross_entropy(said.transpose(1, 2), wanted.transpose(1, 2))
            accelerator.backward(loss)
            optim.step()
            total += loss.item()
        means.append(total / len(pairs))
    return means[0], means[-1], type(network).__name__


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("place_by_hand", [True, False])
def test_the_transformer_loop_learns_with_and_without_placing_by_hand(world: int, place_by_hand: bool) -> None:
    kind = "Transformer" if world == 1 else "DistributedDataParallel"
    for first, last, wrapped in run_ranks(
        transformer_loop, world, place_by_hand, settings=ProcessSettings(device="cpu")
    ):
        assert last < first
        assert wrapped == kind


def scheduled_loop() -> list[float]:
    """On a rank: the learning rates that the optimizer really used."""
    accelerator = Accelerator()
    network = torch.nn.Linear(8, 8)
    optim = torch.optim.SGD(network.parameters(), lr=1.0)
    rates = torch.optim.lr_scheduler.StepLR(optim, step_size=1, gamma=0.5)
    pairs = DataLoader(Sentences(), batch_size=2)
    network, optim, pairs, rates = accelerator.prepare(network, optim, pairs, rates)
    used = []
    for batch in pairs:
        optim.zero_grad()
        inputs, wanted = batch
        inputs, wanted = inputs.to(accelerator.device), wanted.to(accelerator.device)
        accelerator.backward(F.mse_loss(network(inputs), wanted))
        used.append(optim.param_groups[0]["lr"])
        optim.step()
        rates.step()
    return used


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_loop_with_a_scheduler_halves_the_rate_each_step(world: int) -> None:
    expected = [0.5**step for step in range(6 // world)]
    assert run_ranks(scheduled_loop, world, settings=ProcessSettings(device="cpu")) == [expected] * world


NOTEBOOK = """
import torch
from accel import Accelerator, notebook_launcher

def training_function(num_processes=1):
    accelerator = Accelerator(cpu=True)
    network = accelerator.prepare(torch.nn.Linear(2, 1))
    accelerator.backward(network(torch.ones(1, 2)).sum())
    assert accelerator.num_processes == num_processes
    accelerator.end_training()

notebook_launcher(training_function)
notebook_launcher(training_function, args=(2,), num_processes=2)
print("both are through")
"""


def test_a_function_is_launched_from_a_notebook(tmp_path: Path) -> None:
    """In an interpreter of its own, as a kernel is: it forks, and this one has run who knows what before."""
    cells = tmp_path / "cells.py"
    cells.write_text(NOTEBOOK)
    done = subprocess.run([sys.executable, cells], capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (0, "both are through\n"), done.stderr


SCRIPT = """
import argparse
import torch
from accel import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--args_to_my_script", default="none")
given = parser.parse_args().args_to_my_script
accelerator = Accelerator()
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
accelerator.backward(model(torch.ones(1, 2) * (1 + accelerator.process_index)).sum())
optimizer.step()
total = accelerator.reduce(torch.tensor(float(accelerator.process_index + 1)), "sum").item()
alike = accelerator.gather(next(model.parameters()).detach()).unique(dim=0).shape[0]
accelerator.print(f"{accelerator.num_processes} processes, sum {total:g}, {alike} kind(s) of weights, given {given}")
accelerator.end_training()
"""


@pytest.fixture
def my_script(tmp_path: Path) -> Path:
    path = tmp_path / "my_script.py"
    path.write_text(SCRIPT)
    return path


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=90, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


ACCEL = Path(sys.executable).with_name("accel")
ONE = "1 processes, sum 1, 1 kind(s) of weights"
TWO = "2 processes, sum 3, 1 kind(s) of weights"


def test_accel_launch_passes_the_scripts_arguments_on(my_script: Path) -> None:
    done = run(ACCEL, "launch", "--cpu", "--num_processes", "1", my_script, "--args_to_my_script", "these")
    assert done.stdout.strip() == f"{ONE}, given these"


def test_accel_launch_with_nothing_but_a_script(my_script: Path) -> None:
    assert "kind(s) of weights, given none" in run(ACCEL, "launch", my_script).stdout


def test_accel_launch_on_two_processes(my_script: Path) -> None:
    assert run(ACCEL, "launch", "--cpu", "--num_processes", "2", my_script).stdout.strip() == f"{TWO}, given none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so the line would work")
def test_accel_launch_on_gpus_that_are_not_there(my_script: Path) -> None:
    done = run(ACCEL, "launch", "--multi_gpu", "--num_processes", "2", my_script, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for part in ("`--multi-gpu` was given", "no CUDA device is visible", "use `--cpu`"):
        assert part in done.stderr


def test_python(my_script: Path) -> None:
    assert run(sys.executable, my_script).stdout.strip() == f"{ONE}, given none"


def test_torchrun_as_a_module(my_script: Path) -> None:
    words = ["--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = run(sys.executable, "-m", "torch.distributed.run", *words, my_script, "--args_to_my_script", "those")
    assert done.stdout.strip() == f"{TWO}, given those"


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no `mpirun` here: install Open MPI (openmpi-bin) to run it")
def test_mpirun(my_script: Path) -> None:
    allow = ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    done = run("mpirun", *allow, "-np", "2", sys.executable, my_script)
    assert done.stdout.strip() == f"{TWO}, given none"
