"""Every Python block of the documents that needs DeepSpeed runs, on one process and on two."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    """Each with a number of processes, named by its file, its line and that number."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code")) + 1
            name = f"{document.relative_to(ROOT)}:{line}"
            sizes = [2] if "two processes" in match["more"] else [1, 2]
            found += [pytest.param(match["code"], size, id=f"{name}-{size}") for size in sizes]
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("code", "world_size"), blocks())
def test_block_runs(code: str, world_size: int, tmp_path: Path, run_command: Callable[..., Any]) -> None:
    script = tmp_path / "block.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-processes", str(world_size)]
    run_command([*launch, script], timeout_s=150)


def test_blocks_are_found_at_all() -> None:
    """A pattern that matches nothing would pass everything."""
    assert len(blocks()) >= 7
