"""Where a worker's output goes: a pipe or a terminal of its own, whose other end the launcher reads."""

from __future__ import annotations

import fcntl
import os
import pty
import termios
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["Stream", "copy_window_size", "open_channel", "write_all"]

_CHUNK = 65_536


def open_channel(*, terminal: bool) -> tuple[int, int]:
    """A non-blocking end to read from, and the end that a worker writes to.

    Args:
        terminal: make it a terminal, so that progress bars and colours stay as they are on one. It passes
            bytes through as they are, and has the size of this process's terminal.
    """
    if terminal:
        reader, writer = pty.openpty()
        attributes = termios.tcgetattr(writer)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(writer, termios.TCSANOW, attributes)
        copy_window_size(reader)
    else:
        reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return reader, writer


def copy_window_size(to: int, source: int = 2) -> None:
    """Give a terminal the size of the one that `source` is."""
    try:
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8)
    except OSError:  # no terminal there
        return
    fcntl.ioctl(to, termios.TIOCSWINSZ, size)


class Stream:
    """The read end of one worker's stdout or stderr, and its log file."""

    def __init__(self, reader: int, *, terminal: bool, log: BinaryIO | None, take: Callable[[bytes], None]) -> None:
        self.reader = reader
        self.is_open = True
        self._terminal = terminal
        self._log = log
        self._take = take

    def fileno(self) -> int:
        """What a selector waits for."""
        return self.reader

    def read(self) -> bool:
        """Take once what is there. False where there is nothing now, or nothing any more: see `is_open`."""
        try:
            data = os.read(self.reader, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # how a terminal says that nobody holds its other end
            data = b""
        if not data:
            self.is_open = False
            return False
        if self._log is not None:
            self._log.write(data)
        self._take(data)
        return True

    def drain(self) -> None:
        """Take everything that is there."""
        while self.is_open and self.read():
            pass

    def resize(self) -> None:
        """The window of this process's terminal has changed."""
        if self._terminal:
            copy_window_size(self.reader)

    def close(self) -> None:
        """Let go of it and of the log file."""
        self.is_open = False
        os.close(self.reader)
        if self._log is not None:
            self._log.close()


def write_all(fd: int, data: bytes) -> None:
    """Write to a standard stream of this process, or drop what nobody reads any more."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        return
