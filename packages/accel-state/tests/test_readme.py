"""The README's example runs, in a world of one and of two."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_example_runs_as_it_stands(world_size: int, tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    assert example is not None
    script = tmp_path / "example.py"
    script.write_text(example[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    placed = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **placed, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=110)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, outputs
    assert f"rows: [{2 * world_size}, 3]" in outputs[0]
    assert "mean loss" in outputs[0]
    assert all("rows:" not in output and "mean loss" not in output for output in outputs[1:])
