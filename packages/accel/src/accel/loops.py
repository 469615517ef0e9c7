"""Which loader is being iterated, innermost first: what accumulation and metrics ask about the current batch."""

from __future__ import annotations

from typing import Any

from accel_state.protocols import BatchInfo, StatefulLoader

__all__ = ["Loops"]


class Loops:
    """The observer that prepared loaders report to. A loop inside a loop, such as an evaluation, comes first."""

    __slots__ = ("_stack", "info")

    def __init__(self) -> None:
        self._stack: list[StatefulLoader[Any]] = []
        self.info: BatchInfo | None = None
        """The batch that the innermost loop is at; ``None`` outside every loop."""

    @property
    def innermost(self) -> StatefulLoader[Any] | None:
        """The loader whose loop is running."""
        return self._stack[-1] if self._stack else None

    def loader_started(self, loader: StatefulLoader[Any]) -> None:
        self._stack.append(loader)
        self.info = None

    def batch_delivered(self, loader: StatefulLoader[Any], info: BatchInfo) -> None:
        if self._stack and self._stack[-1] is loader:
            self.info = info
        else:  # a loader that is read by hand, such as with `next`, between the batches of another
            self._remove(loader)
            self._stack.append(loader)
            self.info = info

    def loader_ended(self, loader: StatefulLoader[Any]) -> None:
        self._remove(loader)
        self.info = self._stack[-1].batch_info if self._stack else None

    def _remove(self, loader: StatefulLoader[Any]) -> None:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is loader:
                del self._stack[index]
                return
