"""Every Python block of the documents that needs DeepSpeed runs, on one process and on two."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from accel_state.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted((ROOT / "docs" / "pages").rglob("*.md")),
]
BLOCK = re.compile(
    r"^<!-- fragment: needs DeepSpeed(?P<more>[^\n]*) -->\n+```python[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks() -> list[Any]:
    """Each as a parameter named by its file and line."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code")) + 1
            found.append(pytest.param(match["code"], id=f"{document.relative_to(ROOT)}:{line}"))
    return found


def run_block(code: str, folder: str) -> None:
    os.chdir(folder)
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("code", blocks())
def test_block_runs(code: str, world_size: int, tmp_path: Path) -> None:
    run_ranks(run_block, world_size, code, str(tmp_path), open_process=False, timeout_s=150)


def test_blocks_are_found_at_all() -> None:
    """A pattern that matches nothing would pass everything."""
    assert len(blocks()) >= 7
