"""A progress bar that shows up only where there is something to wait for."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_PATIENCE_S = 2.0
"""A load that is over by then shows nothing."""


class Progress:
    """Bytes that were loaded so far.

    Args:
        total_bytes: of the whole load.
        shown: ``True`` shows a bar from the start, ``False`` never, ``None`` once it has lasted two seconds.
    """

    def __init__(self, total_bytes: int, *, shown: bool | None) -> None:
        self._total = total_bytes
        self._from_s = time.monotonic() + (0.0 if shown else _PATIENCE_S)
        self._wanted = shown is not False and total_bytes > 0
        self._lock = threading.Lock()
        self._bar: Any = None
        self.done_bytes = 0
        """So far."""
        if shown:
            self.add(0)

    def add(self, nbytes: int) -> None:
        """So many more. Any thread may call this."""
        with self._lock:
            self.done_bytes += nbytes
            if self._bar is not None:
                self._bar.update(nbytes)
            elif self._wanted and time.monotonic() >= self._from_s:
                from accel_state.logging import tqdm  # here, since tqdm is slow to import and mostly not needed

                self._bar = tqdm(
                    total=self._total, initial=self.done_bytes, unit="B", unit_scale=True, unit_divisor=1024,
                    desc="Loading weights",
                )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
