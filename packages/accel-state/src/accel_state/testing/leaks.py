"""Finds what a test leaves behind: variables, threads, processes, a process group."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from accel_state.env import snapshot
from accel_state.process import Process

__all__ = ["leak_guard"]

_GRACE_S = 1.0
"""How long threads and processes that are about to end may take."""

_FOREIGN_VARIABLES = frozenset(
    {
        "PYTEST_CURRENT_TEST",  # pytest, for each phase of a test
        "TORCHINDUCTOR_CACHE_DIR",  # torch, when it first loads its compiler
        "TRITON_CACHE_DIR",
        "KMP_DUPLICATE_LIB_OK",  # scikit-learn, when it is imported
        "KMP_INIT_AT_FORK",
    }
)
"""What third parties write into this process's environment, whatever a test does."""

_SERVERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
"""Helpers of ``multiprocessing`` that live as long as the process on purpose."""


def leak_guard() -> Iterator[None]:
    """The body of a fixture that fails a test which leaves something behind. In a ``conftest.py``::

        guard = pytest.fixture(autouse=True)(leak_guard)

    Looked for: environment variables changed, threads that are not daemons, live child processes (those of
    ``multiprocessing`` that serve others excepted), an open `Process`, and a process group. The last two are closed,
    so that the following tests start clean.

    Raises:
        AssertionError: after the test, naming all that was left.
    """
    variables, threads, children = snapshot(), set(threading.enumerate()), set(_children())
    yield
    left = [
        *_changed(variables, snapshot()),
        *(f"thread {thread.name!r}" for thread in _remaining_threads(threads)),
        *(f"process {pid}: {command}" for pid, command in _remaining_children(children).items()),
        *_closed_world(),
    ]
    assert not left, "The test left behind:\n  " + "\n  ".join(left)


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    names = sorted((set(before) | set(after)) - _FOREIGN_VARIABLES)
    return [
        f"environment variable {name}: was {before.get(name)!r}, is {after.get(name)!r}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _remaining_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    deadline = time.monotonic() + _GRACE_S
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in set(threading.enumerate()) - before if not thread.daemon]


def _remaining_children(before: set[int]) -> dict[int, str]:
    deadline = time.monotonic() + _GRACE_S
    while True:
        left = {pid: command for pid, command in _children().items() if pid not in before}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def _children() -> dict[int, str]:
    """Live child processes and their commands: all of them on Linux, elsewhere those of ``multiprocessing``."""
    listings = list(Path("/proc/self/task").glob("*/children"))
    if not listings:
        return {each.pid or 0: each.name for each in multiprocessing.active_children()}
    found = {}
    for pid in {int(word) for listing in listings for word in _text(listing).split()}:
        # "12 (name) S ...", with Z for one that has ended and waits to be reaped.
        name, _, rest = _text(Path(f"/proc/{pid}/stat")).partition("(")[2].rpartition(")")
        command = _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip() or name
        if rest.split()[:1] not in ([], ["Z"]) and not any(server in command for server in _SERVERS):
            found[pid] = command[:200]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return ""


def _closed_world() -> list[str]:
    left = []
    if Process.is_open():
        left.append(f"open {Process.current()!r}")
        Process.current().close()
    if dist.is_available() and dist.is_initialized():
        left.append(f"a process group of {dist.get_world_size()}")
        dist.destroy_process_group()
    return left
