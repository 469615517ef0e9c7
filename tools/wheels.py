"""Builds the wheel of every package into one folder: ``hatch run wheels:build``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from repository import ROOT, packages

__all__ = ["build"]


def build(target: Path) -> dict[str, Path]:
    """Build all wheels with the hatchling of this interpreter. Returns the wheel of each distribution.

    Wheels of ours that were in the folder are replaced, so that it holds one version of each.
    """
    target.mkdir(parents=True, exist_ok=True)
    wheels = {}
    for name, package in packages().items():
        pattern = f"{package.import_name}-[0-9]*.whl"
        for old in target.glob(pattern):
            old.unlink()
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
            cwd=package.folder,
            check=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        (wheels[name],) = target.glob(pattern)
    return wheels


def main() -> int:
    """Build, and list what was built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="folder for the wheels (default: dist)")
    for wheel in build(parser.parse_args().to).values():
        print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
