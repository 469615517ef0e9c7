"""Whose speed is measured: the implementations, and the interpreter that runs each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NAMES", "PACKAGE_OF", "Side", "inspect_sides"]

TOOLS = Path(__file__).resolve().parent.parent
SOURCES = sorted(TOOLS.parent.glob("packages/*/src"))

PACKAGE_OF = {"torch": "torch", "accel": "accel", "accelerate": "accelerate", "fabric": "lightning_fabric"}
"""What each side must be able to import."""
NAMES = {"torch": "torch", "accel": "accel", "accelerate": "accelerate", "fabric": "Lightning Fabric"}
"""How each is called in the report."""
PEERS = ("accelerate", "fabric")

_LAUNCHERS_OWN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHERS_PREFIXES = ("ACCEL", "TORCHELASTIC_", "OMPI_", "PMI_", "SLURM_")
_SLOWING = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONDEVMODE", "PYTHONPROFILEIMPORTTIME")
"""Without bytecode, imports would be compilations."""

_PROBE = """
import importlib.util, json, importlib.metadata as metadata
found = {}
for package in ("torch", "accel", "accelerate", "lightning_fabric"):
    if importlib.util.find_spec(package) is not None:
        try:
            found[package] = metadata.version(package.replace("_", "-"))
        except metadata.PackageNotFoundError:
            found[package] = "of this checkout"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Side:
    """One implementation and where it is installed."""

    name: str
    """Key of `NAMES`."""
    python: str
    """Interpreter that it is installed for."""
    versions: dict[str, str]
    """What that interpreter finds, by import name."""
    search_path: str
    """``PYTHONPATH`` of its processes."""

    @property
    def version(self) -> str | None:
        """Its version, ``None`` where it is not installed."""
        return self.versions.get(PACKAGE_OF[self.name])

    def environment(self, **more: str) -> dict[str, str]:
        """Variables of its processes: those of this one without what would change the measure, and `more`."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in (*_LAUNCHERS_OWN, *_SLOWING) and not name.startswith(_LAUNCHERS_PREFIXES)
        }
        return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": self.search_path, **more}


def inspect_sides(*, peer_python: str | None) -> dict[str, Side]:
    """The sides that are installed: torch and accel for this interpreter, the peers for `peer_python`.

    Where accel is not installed it is read from the checkout. A peer whose torch has another version is left out,
    since what then differs would not be the peer.
    """
    ours = _versions(sys.executable, str(TOOLS))
    path = os.pathsep.join([str(TOOLS), *([] if "accel" in ours else map(str, SOURCES))])
    ours = _versions(sys.executable, path)
    theirs = _versions(peer_python, str(TOOLS)) if peer_python else {}
    sides = {name: Side(name, sys.executable, ours, path) for name in ("torch", "accel")}
    if peer_python and theirs.get("torch") == ours.get("torch"):
        sides.update({name: Side(name, peer_python, theirs, str(TOOLS)) for name in PEERS})
    elif theirs:
        print(f"The peers have torch {theirs.get('torch')}, accel has {ours.get('torch')}: not compared.")
    return {name: side for name, side in sides.items() if side.version is not None}


def _versions(python: str, path: str) -> dict[str, str]:
    done = subprocess.run(
        [python, "-c", _PROBE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found
