"""Trackers of a run: started, fed and finished on the main process only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.protocols import Tracker
from accel_track import Fanout, LogWith, make_trackers

__all__ = ["SilentTracker", "Tracking"]


class SilentTracker:
    """What `get_tracker` gives on other processes than the main one: it keeps nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, run: str, *, config: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class Tracking:
    """The trackers that ``log_with`` asks for, from the main process."""

    def __init__(self, log_with: LogWith, process: Process, directory: Path | None) -> None:
        self._asked = log_with is not None
        self._fanout = Fanout(make_trackers(log_with, directory)) if process.topology.is_main else None

    def start(self, run: str, config: Mapping[str, Any]) -> None:
        """Begin a run on all trackers.

        Raises:
            ConfigError: if no tracker was asked for.
        """
        self._refuse_none("init_trackers")
        if self._fanout is not None:
            self._fanout.start(run, config=config)

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Send values to all trackers."""
        self._refuse_none("log")
        if self._fanout is not None:
            self._fanout.log(values, step=step)

    def get(self, name: str) -> Tracker:
        """One of them by name; elsewhere than on the main process a silent one."""
        self._refuse_none("get_tracker")
        return SilentTracker(name) if self._fanout is None else self._fanout.get(name)

    def finish(self) -> None:
        """End the run. Does nothing where none was begun."""
        if self._fanout is not None:
            self._fanout.finish()

    def _refuse_none(self, call: str) -> None:
        if not self._asked:
            raise ConfigError(
                f"`{call}` was called, but no tracker was asked for, so the values would be lost. "
                f"Create `Accelerator(log_with='jsonl', project_dir=...)`, or leave the call out."
            )
