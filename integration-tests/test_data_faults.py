"""Data that fails on one rank: every rank ends, soon, and the message says which sample, and where."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from accel import Accelerator, DataLoaderConfiguration

case = sys.argv[1]

class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 37:
            if case == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("no such image")
        return torch.full((3,), float(index))

class Stream(IterableDataset):
    def __iter__(self):
        data = Rows()
        rank = int(os.environ["RANK"])  # only this rank's copy of the storage is broken
        return (data[index] if rank == 1 or index != 37 else torch.zeros(3) for index in range(64))

workers = {"num_workers": 2} if case in ("workers", "dies") else {}
dispatch = DataLoaderConfiguration(dispatch_batches=case == "dispatched")
accelerator = Accelerator(dataloader_config=dispatch)
model = torch.nn.Linear(3, 1)
loader = DataLoader(Stream() if case == "stream" else Rows(), batch_size=4, **workers)
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
for batch in loader:
    accelerator.backward(model(batch).mean())
    optimizer.step()
    optimizer.zero_grad()
accelerator.end_training()
"""

LAUNCHERS = {
    "accel": [sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-processes", "2"],
    "torchrun": [
        *[sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"],
        *["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"],
    ],
}


@pytest.mark.parametrize(
    ("launcher", "case"),
    [
        ("accel", "plain"),
        ("accel", "dies"),
        *(pytest.param("accel", case, marks=pytest.mark.matrix) for case in ("workers", "stream", "dispatched")),
        pytest.param("torchrun", "plain", marks=pytest.mark.matrix),
    ],
)
def test_all_ranks_end_and_the_sample_is_named(
    launcher: str, case: str, run_command: Callable[..., Any], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run_command([*LAUNCHERS[launcher], str(script), case], timeout_s=60, check=False)
    assert done.returncode not in (0, None)
    assert done.seconds < 45
    said = {
        "plain": "Sample 37 was asked for by the loader 'data loader' on data rank 1, and Rows raised KeyError",
        "workers": "Sample 37 was asked for by the loader 'data loader' on data rank 1, and Rows raised KeyError",
        "stream": "Sample 37 of part 0 of the data loader was read on data rank 1, and the dataset raised KeyError",
        "dispatched": "Sample 37 was asked for by the loader 'data loader' on data rank 0, and Rows raised KeyError",
        "dies": "A worker process of the data loader ended without an answer",
    }[case]
    # torch tells of a dead worker by a signal, which may come while the script is somewhere else than in the loader.
    assert said in done.stderr or (case == "dies" and "is killed by signal: Killed" in done.stderr)
