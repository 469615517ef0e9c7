"""The README's examples run as they stand."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

from accel_state.testing import rank_environment, run_ranks

README = Path(__file__).parents[1] / "README.md"
WHOLE = [f"epoch {epoch}: the ids sum to {sum(range(100))}" for epoch in range(2)]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def run(script: str, folder: str) -> list[str]:
    """What a script prints that is run as torchrun would run it, in a process of its own."""
    place = rank_environment()
    os.chdir(folder)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR=place.master_addr or "",
        MASTER_PORT=str(place.master_port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
    return printed.getvalue().splitlines()


def test_the_first_example(tmp_path: Path) -> None:
    printed = run_ranks(run, 1, blocks()[0], str(tmp_path), open_process=False)[0]
    assert len(printed) == 4
    assert printed[1].startswith("rank 0 step 1: ")
    assert printed[1].endswith("real: 1, last: True")


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_script_that_uses_torch_distributed(world_size: int, tmp_path: Path) -> None:
    script, folder = blocks()[1], str(tmp_path)
    assert run_ranks(run, world_size, script, folder, open_process=False)[0] == WHOLE
    (tmp_path / "place.json").unlink()
    body = "        info = loader.batch_info\n"
    assert body in script
    stopped = script.replace(body, body + "        if info.index == 4: raise SystemExit\n")
    run_ranks(run, world_size, stopped, folder, open_process=False)
    printed = run_ranks(run, 3 - world_size, script, folder, open_process=False)[0]
    assert printed[1] == WHOLE[1]
    assert printed[0] != WHOLE[0]  # only what was left of it
