"""Which loader is being iterated, innermost first, and which batches an accumulation window was fed.

Accumulation and metrics ask about the current batch; a checkpoint asks how far to go back, since it holds no gradients.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from accel_state.protocols import BatchInfo, StatefulLoader

__all__ = ["Loops"]


class Loops:
    """The observer that prepared loaders report to. A loop inside a loop, such as an evaluation, comes first.

    Loaders that are read in turns, as by ``zip`` or by ``next`` in the loop of another, make up one loop together.
    """

    __slots__ = ("_begun", "_delivered", "_fed", "_infos", "_loops", "ended_padded")

    def __init__(self) -> None:
        self._loops: list[list[StatefulLoader[Any]]] = []
        """The loops that are running, innermost last, each with the loaders that it reads."""
        self._infos: dict[int, BatchInfo] = {}
        """The batch that each running loader is at; loaders by their identity."""
        self._delivered: dict[int, int] = {}
        """Batches that each loader has ever handed out."""
        self._begun: dict[int, int] = {}
        """The same when its loop began."""
        self._fed: dict[Hashable, tuple[dict[int, int], dict[int, int]]] = {}
        """Of each window, the batches of its loaders before its first micro-batch, and up to its last one."""
        self.ended_padded = False
        """Whether no loop is running, and the last one came to its end with a padded batch."""

    @property
    def infos(self) -> list[BatchInfo]:
        """The batches that the innermost loop is at, one a loader; none outside every loop."""
        if not self._loops:
            return []
        return [self._infos[id(loader)] for loader in self._loops[-1] if id(loader) in self._infos]

    @property
    def remaining(self) -> int | None:
        """Batches after this one, until the innermost loop ends or reads on anew; ``None`` where that is not known."""
        if not self._loops:
            return None
        return min((info.remaining for info in self.infos if info.remaining is not None), default=None)

    def loader_started(self, loader: StatefulLoader[Any]) -> None:
        self._loops.append([loader])
        self._begun[id(loader)] = self._delivered.get(id(loader), 0)
        self.ended_padded = False

    def batch_delivered(self, loader: StatefulLoader[Any], info: BatchInfo) -> None:
        key = id(loader)
        self._delivered[key] = self._delivered.get(key, 0) + 1
        self._infos[key] = info
        if self._loops and self._loops[-1][0] is loader:
            return
        for index, loop in enumerate(self._loops):
            if any(each is loader for each in loop):
                # It goes on although others began after it: they are read in turns with it, not inside its body.
                self._loops[index:] = [[each for inner in self._loops[index:] for each in inner]]
                return

    def loader_ended(self, loader: StatefulLoader[Any]) -> None:
        info = self._infos.pop(id(loader), None)
        for loop in self._loops:
            loop[:] = [each for each in loop if each is not loader]
        self._loops = [loop for loop in self._loops if loop]
        self.ended_padded = not self._loops and info is not None and info.is_last and info.real_rows != info.rows

    def feed(self, window: Hashable, *, first: bool) -> None:
        """A micro-batch of `window` begins, its first one or a later one, on the batches that the loops are at."""
        if not self._loops and window not in self._fed:
            return
        start, seen = self._fed.get(window) or ({}, {})
        if first:
            start = {}
        for loader in (loader for loop in self._loops for loader in loop):
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
