"""Ends the workers when the launcher itself is killed and cannot do it.

A process of its own holds one end of a pipe. Whatever ends the launcher closes the other end. This reaches
whole process groups, so also what workers have started, which a death signal from the kernel would not.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import TracebackType

__all__ = ["Guard"]


class Guard:
    """While open, the process groups that are handed to it do not outlive this process."""

    def __enter__(self) -> Guard:
        reader, self._writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _watch(reader)
        os.close(reader)
        return self

    def protect(self, group: int) -> None:
        """Hand over a process group."""
        self._tell(f"{group}\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tell("done\n")
        os.close(self._writer)
        os.waitpid(self._pid, 0)

    def _tell(self, text: str) -> None:
        with suppress(BrokenPipeError):  # somebody killed the guard: the launch goes on without it
            os.write(self._writer, text.encode())


def _watch(reader: int) -> None:
    """Body of the guard's process; does not return.

    It leaves the terminal's session, so that Ctrl-C does not end it before the workers, and holds nothing
    open that others wait to see closed.
    """
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.dup2(reader, 3)
        os.closerange(4, min(os.sysconf("SC_OPEN_MAX"), 65_536))
        text = b""
        while data := os.read(3, 65536):
            text += data
        words = text.decode().split()
        if not words or words[-1] != "done":
            for group in words:
                _kill(int(group))
    finally:
        os._exit(0)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
