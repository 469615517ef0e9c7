"""A script that keeps a data-parallel model to its very end ends well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The long switch interval keeps other threads from the interpreter until the script has ended, as a busy machine does.
SCRIPT = """
import sys
sys.setswitchinterval(10)
import torch
from accel import Accelerator
accelerator = Accelerator()
model = accelerator.prepare(torch.nn.Linear(2, 1))
for _ in range(20):
    accelerator.gather(next(model.parameters()).detach())
{end}
"""


@pytest.mark.parametrize("end", ["accelerator.end_training()", ""], ids=["ended", "not ended"])
def test_threads_of_the_last_collective_do_not_abort_the_process(
    end: str, run_command: Callable[..., Any], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(end=end))
    for _ in range(2):
        run_command([sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-processes", "3", script])
