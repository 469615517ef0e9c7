"""Signals as data: they wake a selector and are read as numbers, so that no code runs inside a handler."""

from __future__ import annotations

import signal
import socket
from types import FrameType, TracebackType

__all__ = ["PASSED_ON", "SignalPipe"]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)
"""By which a scheduler speaks to the script: what they mean is its matter."""


class SignalPipe:
    """While open, the signals that stop a launch or are passed on, the end of a child and a new window size come here.

    A signal that this process was started to ignore (as nohup does with SIGHUP) stays ignored. Open it in
    the main thread.
    """

    def __enter__(self) -> SignalPipe:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous = {
            number: signal.signal(number, _wake)
            for number in (*_STOPPING, *PASSED_ON, signal.SIGCHLD, signal.SIGWINCH)
            if not (number in (*_STOPPING, *PASSED_ON) and signal.getsignal(number) is signal.SIG_IGN)
        }
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """What a selector waits for."""
        return self._reader.fileno()

    def read(self) -> list[signal.Signals]:
        """Signals that have come since the last call, without those that only wake."""
        try:
            numbers = self._reader.recv(4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in numbers if number != signal.SIGCHLD]


def _wake(number: int, frame: FrameType | None) -> None:
    """Nothing to do: that there is a handler makes the interpreter write the number to the pipe."""
