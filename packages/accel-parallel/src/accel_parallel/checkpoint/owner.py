"""Which host a name was made on, and whether the process that made it lives: what the dead left behind may go."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["host_name", "lives"]


def host_name() -> str:
    """This host, and this container where it numbers its processes apart: elsewhere a number says nothing."""
    namespace = Path("/proc/self/ns/pid")
    apart = f"-{namespace.stat().st_ino}" if namespace.exists() else ""
    return f"{platform.node() or 'localhost'}{apart}"


def lives(pid: int) -> bool:
    """Whether this host runs a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
