"""Documentation cannot rot: every Python block of it runs, every page is reachable, every named command exists.

A block that cannot stand alone says so in the line above it: ``<!-- fragment: why -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "pages").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), ROOT / "docs" / "architecture.md", *PAGES]
BLOCK = re.compile(
    r"^(?:<!-- fragment: (?P<why>.+?) -->\n+)?```python[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks() -> Iterator[Any]:
    """Each block that can stand alone, as a parameter named by its file and line."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["why"] is None:
                line = text.count("\n", 0, match.start("code")) + 1
                yield pytest.param(match["code"], id=f"{document.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("code", list(blocks()))
def test_python_block_runs(code: str, run_command: Any, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    run_command([sys.executable, "-W", "error::DeprecationWarning:__main__", script], timeout_s=90)


def test_blocks_are_found_at_all() -> None:
    """A pattern that matches nothing would pass everything."""
    assert len(list(blocks())) >= 10


@pytest.mark.parametrize("package", sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")))
def test_each_package_shows_an_example(package: str) -> None:
    text = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^```(python|bash|console)", text, re.MULTILINE), f"{package}/README.md shows no example"


def test_first_screen_of_the_readme_has_both_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20])
    assert "pip install hatch && hatch run quickstart" in first_screen
    assert "pip install hatch && hatch run test" in first_screen


def test_site_is_built_strictly() -> None:
    assert re.search(r"^strict: true$", (ROOT / "docs" / "mkdocs.yml").read_text(), re.MULTILINE)
    assert re.search(r'^build = "mkdocs build --strict ', (ROOT / "hatch.toml").read_text(), re.MULTILINE)
    assert "hatch run docs:build" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_in_the_navigation(page: Path) -> None:
    if page.name != "benchmarks.md":  # docs/hooks.py adds it
        assert f": {page.relative_to(ROOT / 'docs' / 'pages')}\n" in (ROOT / "docs" / "mkdocs.yml").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_commands_that_are_named_exist(document: Path) -> None:
    text = (ROOT / "hatch.toml").read_text()
    commands = set()
    for name, body in re.findall(r"^\[envs\.([\w-]+)\.scripts\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL):
        for script in re.findall(r"^([\w-]+) = ", body, re.MULTILINE):
            commands.add(script if name == "default" else f"{name}:{script}")
    named = set(re.findall(r"hatch run ([a-z][\w:-]*)", document.read_text(encoding="utf-8")))
    assert named <= commands, f"{document.relative_to(ROOT)} names {sorted(named - commands)}"
