"""What of a rank's stderr is shown, and when: tracebacks wait until it is known whether they are the cause.

When one rank fails, its peers fail after it, each with a long traceback about a lost connection. So what begins like
the last words of a process is held back until the process has ended, or lives on. Pure: bytes and times in, bytes out.
"""

from __future__ import annotations

import re

__all__ = ["FINAL_RELEASE_AFTER_S", "RELEASE_AFTER_S", "StderrWatch", "speaks_of_lost_peer"]

RELEASE_AFTER_S = 1.0
"""How long a process lives on after a traceback for that to be something it logged."""
FINAL_RELEASE_AFTER_S = 15.0
"""The same for a traceback that begins where the program does, as one that nobody caught. Ending takes its time:
process groups and worker processes are taken down, on a busy machine for seconds."""

_PARTIAL_AFTER_S = 0.05
"""How long an unfinished line waits for its end. A progress bar never ends its line; other ranks' lines may not
break into one that is being written."""

_LAST_WORDS = re.compile(
    rb"(?:\[rank\d+\]: ?)?[ \t]*(?:\+ Exception Group )?Traceback \(most recent call last\):"  # torch adds the rank
    rb"|^(?:\[rank\d+\]: ?)?  File \"[^\"\n]+\", line \d+\s*$"  # a syntax error has no header
    rb"|^Fatal Python error: "
    rb"|^usage: "  # argparse, before it exits
    rb"|^\S*python[\d.]*: "  # the interpreter itself, as in "No module named"
)
_CASCADE = re.compile(
    rb"[Cc]onnection (?:was )?(?:reset|closed|refused)|Broken pipe|DistBackendError|DistNetworkError|recvBytes|"
    rb"KeyboardInterrupt"
)
_UNCAUGHT = re.compile(
    rb"Traceback \(most recent call last\):\r?\n[^\n]*File [^\n]*, in (?:<module>|_run_module_as_main)"
)
_LINE_END = re.compile(rb"[\r\n]")


def speaks_of_lost_peer(text: bytes) -> bool:
    """Whether a traceback is about a peer that went away, and so not the cause."""
    return _CASCADE.search(text) is not None


class StderrWatch:
    """Decides for one rank. Every method returns what is to be shown now."""

    def __init__(self) -> None:
        self.held_since: float | None = None
        """When the text that is held back began; ``None`` while nothing is."""
        self._held = bytearray()
        self._line = bytearray()
        self._line_since = 0.0

    def feed(self, data: bytes, now: float) -> bytes:
        """Take what the rank has written."""
        if self.held_since is not None:
            self._held += data
            return b""
        if not self._line:
            self._line_since = now
        self._line += data
        shown = bytearray()
        while end := _LINE_END.search(self._line):
            line = bytes(self._line[: end.end()])
            start = _LAST_WORDS.search(line)
            if start is not None:
                shown += line[: start.start()]
                self.held_since = now
                self._held += self._line[start.start() :]
                self._line.clear()
                return bytes(shown)
            shown += line
            del self._line[: end.end()]
            self._line_since = now
        return bytes(shown)

    def poll(self, now: float) -> bytes:
        """What has waited long enough."""
        if self.held_since is not None:
            return self.release() if now >= self.held_since + self._patience_s else b""
        return self._take_line() if self._line and now >= self._line_since + _PARTIAL_AFTER_S else b""

    @property
    def next_poll(self) -> float | None:
        """When `poll` will have something; ``None``: not before it is fed."""
        if self.held_since is not None:
            return self.held_since + self._patience_s
        return self._line_since + _PARTIAL_AFTER_S if self._line else None

    def flush(self) -> bytes:
        """The unfinished line, at the end of the stream. What is held back stays."""
        if self._line and _LAST_WORDS.search(self._line):
            self.held_since = self._line_since
            self._held += self._take_line()
            return b""
        return self._take_line()

    def release(self) -> bytes:
        """What is held back, and back to showing."""
        held = bytes(self._held)
        self._held.clear()
        self.held_since = None
        return held

    @property
    def looks_final(self) -> bool:
        """Whether what is held back ends the program: it is no traceback of an inner function, which was caught."""
        return self.held_since is not None and (
            _UNCAUGHT.search(self._held) is not None or b"Traceback (most" not in self._held
        )

    @property
    def looks_cascaded(self) -> bool:
        """Whether what is held back speaks of a peer that went away."""
        return speaks_of_lost_peer(bytes(self._held))

    @property
    def _patience_s(self) -> float:
        return FINAL_RELEASE_AFTER_S if self.looks_final else RELEASE_AFTER_S

    def _take_line(self) -> bytes:
        line = bytes(self._line)
        self._line.clear()
        return line
