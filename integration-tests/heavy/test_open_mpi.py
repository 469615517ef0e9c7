"""Ranks started by Open MPI find one another without torchrun's variables."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

MPIRUN = shutil.which("mpirun")

SCRIPT = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accel_state import Process, ProcessSettings

with Process.open(ProcessSettings(device="cpu", timeout_s=60)) as process:
    total = torch.tensor([process.topology.rank + 1.0])
    if process.topology.world_size > 1:  # a world of one has no process group
        dist.all_reduce(total)
    topology = process.topology
    line = f"{process.environment.launcher.value} {topology.rank}/{topology.world_size} {total.item():g}"
    (Path(sys.argv[1]) / str(topology.rank)).write_text(line)  # printed lines of several ranks may run into each other
"""


@pytest.mark.skipif(MPIRUN is None, reason="`mpirun` is not installed (Debian: apt-get install openmpi-bin)")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_of_mpirun_meet(run_command: Any, tmp_path: Path, world_size: int) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    said = tmp_path / "said"
    said.mkdir()
    ranks = [sys.executable, script, said]
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(world_size), *ranks]
    run_command(command, timeout_s=90, env={"OMP_NUM_THREADS": "1"})
    total = world_size * (world_size + 1) // 2
    assert {path.name: path.read_text() for path in said.iterdir()} == {
        str(rank): f"open-mpi {rank}/{world_size} {total}" for rank in range(world_size)
    }
