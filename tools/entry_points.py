"""Installs a package of ours anew where its commands or plug-ins are not those that its pyproject.toml declares.

An editable install follows the sources, but keeps what it registered when it was made. After a pull that brings an
entry point, an environment that is there already would not know it. Run before the tests.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence

from repository import Package, packages

__all__ = ["main", "stale"]

Declared = set[tuple[str, str, str]]
"""Group, name and object reference of each entry point."""


def declared(package: Package) -> Declared:
    """What its pyproject.toml says."""
    groups = {"console_scripts": package.project.get("scripts", {}), **package.project.get("entry-points", {})}
    return {(group, name, value) for group, entries in groups.items() for name, value in entries.items()}


def registered(package: Package) -> Declared | None:
    """What this environment knows; None where the package is not installed at all."""
    try:
        found = importlib.metadata.distribution(package.name).entry_points
    except importlib.metadata.PackageNotFoundError:
        return None
    return {(entry.group, entry.name, entry.value) for entry in found}


def stale(members: Sequence[Package]) -> list[Package]:
    """Those whose registration is another one than their declaration. What is not installed is none of them."""
    found = []
    for package in members:
        known = registered(package)
        if known is not None and known != declared(package):
            found.append(package)
    return found


def main() -> None:
    """Install those anew, without a word where there is none."""
    old = stale(list(packages().values()))
    if not old:
        return
    print(f"installing anew, for their entry points: {', '.join(package.name for package in old)}", flush=True)
    editable = [argument for package in old for argument in ("--editable", str(package.folder))]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *editable], check=True)


if __name__ == "__main__":
    main()
