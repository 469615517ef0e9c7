"""Adds to the site what is written elsewhere: the architecture, the format of checkpoints, and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
PACKAGES = HERE.parent / "packages"


def on_config(config: Any) -> Any:
    """Complete the navigation."""
    if (HERE / "pages" / "benchmarks.md").exists():
        config.nav.append({"Benchmarks": "benchmarks.md"})
    config.nav.append({"Checkpoint format": "checkpoint-format.md"})
    config.nav.append({"Architecture": "architecture.md"})
    config.nav.append({"Reference": [{name: f"reference/{name}.md"} for name in _packages()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file in pages/ holds."""
    for page in ("architecture.md", "checkpoint-format.md"):
        files.append(File.generated(config, page, content=(HERE / page).read_text(encoding="utf-8")))
    for name in _packages():
        files.append(File.generated(config, f"reference/{name}.md", content=_reference(name)))
    return files


def _packages() -> list[str]:
    return sorted(folder.name for folder in PACKAGES.iterdir() if (folder / "pyproject.toml").exists())


def _reference(name: str) -> str:
    """The public modules of a package, each rendered from its source."""
    package = name.replace("-", "_")
    source = PACKAGES / name / "src"
    lines = [f"# {name}", "", f"Import name `{package}`. Names with a leading underscore are private."]
    for path in sorted((source / package).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            module = ".".join(parts)
            # A package's own names are documented in the modules that define them.
            members = "    options:\n      members: false\n" if path.name == "__init__.py" else ""
            lines += ["", f"## `{module}`", "", f"::: {module}", members.rstrip()]
    return "\n".join(lines) + "\n"
