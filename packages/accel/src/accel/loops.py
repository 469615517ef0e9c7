"""Which loader is being iterated, innermost first, and which batches an accumulation window was fed.

Accumulation and metrics ask about the current batch; a checkpoint asks how far to go back, since it holds no gradients.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from accel_state.protocols import BatchInfo, StatefulLoader

__all__ = ["Loops"]


class Loops:
    """The observer that prepared loaders report to. A loop inside a loop, such as an evaluation, comes first."""

    __slots__ = ("_begun", "_delivered", "_fed", "_stack", "info")

    def __init__(self) -> None:
        self._stack: list[StatefulLoader[Any]] = []
        self._delivered: dict[int, int] = {}
        """Batches that each loader has ever handed out; loaders by their identity."""
        self._begun: dict[int, int] = {}
        """The same when its loop began."""
        self._fed: dict[Hashable, tuple[dict[int, int], dict[int, int]]] = {}
        """Of each window, the batches of its loaders before its first micro-batch, and up to its last one."""
        self.info: BatchInfo | None = None
        """The batch that the innermost loop is at; ``None`` outside every loop."""

    def loader_started(self, loader: StatefulLoader[Any]) -> None:
        self._stack.append(loader)
        self._begun[id(loader)] = self._delivered.get(id(loader), 0)
        self.info = None

    def batch_delivered(self, loader: StatefulLoader[Any], info: BatchInfo) -> None:
        self._delivered[id(loader)] = self._delivered.get(id(loader), 0) + 1
        if self._stack and self._stack[-1] is loader:
            self.info = info
        else:  # a loader that is read by hand, such as with `next`, between the batches of another
            self._remove(loader)
            self._stack.append(loader)
            self.info = info

    def loader_ended(self, loader: StatefulLoader[Any]) -> None:
        self._remove(loader)
        self.info = self._stack[-1].batch_info if self._stack else None

    def feed(self, window: Hashable, *, first: bool) -> None:
        """A micro-batch of `window` begins, its first one or a later one, on the batches that the loops are at."""
        start, seen = self._fed.get(window) or ({}, {})
        if first:
            start = {}
        for loader in self._stack:
            key = id(loader)
            # What came since the last micro-batch belongs to this one, such as batches that the script passed over.
            start.setdefault(key, max(seen.get(key, 0), self._begun.get(key, 0)))
            seen[key] = self._delivered.get(key, 0)
        self._fed[window] = (start, seen)

    def num_fed(self, window: Hashable, loader: StatefulLoader[Any]) -> int:
        """Batches that `loader` has handed out since `window` began; 0 if that window is not fed from it."""
        start = self._fed[window][0] if window in self._fed else {}
        return self._delivered[id(loader)] - start[id(loader)] if id(loader) in start else 0

    def forget(self) -> None:
        """Let go of all windows and of what loaders have handed out."""
        for held in (self._delivered, self._begun, self._fed):
            held.clear()

    def _remove(self, loader: StatefulLoader[Any]) -> None:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is loader:
                del self._stack[index]
                return
