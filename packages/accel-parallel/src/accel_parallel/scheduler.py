"""The scheduler that a training loop holds after ``prepare``: one step for each optimizer step that was taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accel_parallel.optimizer import PreparedOptimizer

__all__ = ["PreparedScheduler"]


class PreparedScheduler:
    """Wraps a learning-rate scheduler. Its schedule counts optimizer steps, whatever the number of processes."""

    def __init__(self, scheduler: Any, *, optimizers: Sequence[PreparedOptimizer], follow: bool = True) -> None:
        """
        Args:
            scheduler: anything with ``step``, ``state_dict`` and ``load_state_dict``.
            optimizers: the ones whose steps it follows.
            follow: ``False`` lets every ``step()`` through, for a script that decides by itself.
        """
        self.scheduler = scheduler
        self._optimizers = tuple(optimizers)
        self._follow = follow
        self._seen = self._taken()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step if an optimizer has stepped since the last call; inside a window or after a skipped step do nothing."""
        if self._follow:
            taken = self._taken()
            if taken == self._seen:
                return
            self._seen = taken
        self.scheduler.step(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)

    def settle(self) -> None:
        """Take the optimizers' counts as seen. Called after a checkpoint restored both."""
        self._seen = self._taken()

    def _taken(self) -> int:
        return sum(optimizer.steps_taken for optimizer in self._optimizers)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler" or name.startswith("__"):  # not set yet, or asked by copying: never the wrapped one's
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __repr__(self) -> str:
        return f"Prepared({self.scheduler!r})"
