"""Where the packages of this repository are and what each declares. Read by the other tools."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ROOT", "Package", "packages"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """One folder of ``packages/``."""

    folder: Path
    project: dict[str, Any]
    """The ``[project]`` table of its pyproject.toml."""

    @property
    def name(self) -> str:
        """Name of the distribution, such as ``accel-data``."""
        return str(self.project["name"])

    @property
    def import_name(self) -> str:
        """Name of the import package, such as ``accel_data``."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        """Folder of the import package."""
        return self.folder / "src" / self.import_name

    @property
    def version_file(self) -> Path:
        """The one place where the version is written."""
        return self.source / "_version.py"

    @property
    def version(self) -> str:
        """The version as it is in the working tree."""
        match = re.search(r'__version__ = "([^"]+)"', self.version_file.read_text(encoding="utf-8"))
        if match is None:
            raise SystemExit(f'{self.version_file} holds no `__version__ = "..."`.')
        return match[1]

    @property
    def requirements(self) -> dict[str, str]:
        """What it declares: normalised distribution name to the whole requirement, extras left out."""
        found = {}
        for requirement in self.project.get("dependencies", []):
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            if match is None:
                raise SystemExit(f"{self.folder / 'pyproject.toml'}: {requirement!r} is no requirement.")
            found[re.sub(r"[-_.]+", "-", match[0]).lower()] = requirement
        return found


def packages(root: Path = ROOT) -> dict[str, Package]:
    """Every package of the repository by its distribution name, in order of name."""
    found = {}
    for file in sorted(root.glob("packages/*/pyproject.toml")):
        with file.open("rb") as stream:
            package = Package(file.parent, tomllib.load(stream)["project"])
        found[package.name] = package
    return found
