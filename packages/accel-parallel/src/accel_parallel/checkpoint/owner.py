"""Which host a name was made on, and whether the process that made it lives: what the dead left behind may go."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["hold", "host_name", "is_held", "lives"]


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


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """While open, `is_held` says so of the folder, in every process of this host; it ends with the process."""
    descriptor = -1
    with suppress(OSError):  # a file system without locks, or without the folder
        descriptor = os.open(folder, os.O_RDONLY)
        if sys.platform != "win32":
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process of this host holds it."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
