"""A save that may still be going on, as its run holds it. Loads nothing of what writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import CheckpointError
from accel_state.logging import get_logger
from accel_state.process import Process

__all__ = ["PendingSave", "Writer"]

logger = get_logger(__name__)


class Writer(Protocol):
    """What writes, from the side of the run."""

    @property
    def ended(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
    def give_up(self) -> None: ...
    def outcome(self, *, leave: bool = False) -> str | None:
        """Wait for its end. What failed, or ``None``. `leave` says that nobody will tell it anything more."""


class PendingSave:
    """A save that may still be going on."""

    def __init__(self, path: str | Path, writer: Writer, process: Process) -> None:
        self.path = path
        """The folder that it will be complete in."""
        self._writer = writer
        self._process = process
        self._owner = os.getpid()
        self._settled = False
        self._problem: str | None = None
        self._told = False
        """Whether somebody has had the problem raised."""

    @property
    def done(self) -> bool:
        """Whether this rank's writer has ended: its files are on the disk, and the main process's has committed."""
        return self._writer.ended

    @property
    def failed(self) -> bool:
        """Whether this rank's writer has ended and could not do its part. `wait` says why."""
        return self._writer.failed

    def wait(self) -> str | Path:
        """Wait until the checkpoint is complete, and return its folder. Every rank must call this.

        Raises:
            CheckpointError: on every rank, if it could not be written; earlier checkpoints are untouched.
        """
        if not self._settled:
            self._settle()
        if self._problem is not None:
            self._told = True
            raise CheckpointError(self._problem)
        return self.path

    def wait_unless_told(self) -> None:
        """The same for whoever comes next: what was raised already is not raised again."""
        if not self._told:
            self.wait()

    def _settle(self) -> None:
        is_main = self._process.topology.is_main
        # The main process's writer waits for the others; so it is asked for its outcome last.
        problems = gather_object([None if is_main else self._writer.outcome()], process=self._process)
        found = [problem for problem in problems if problem is not None]
        if is_main:
            if found:
                self._writer.give_up()
            problem = self._writer.outcome()
            found = found or ([problem] if problem is not None else [])
        (told,) = broadcast_object_list([found[:1]], process=self._process)
        # Only now: an interrupt before leaves it to be waited for, since its memory is not free yet.
        self._problem, self._settled = (told[0] if told else None), True

    def finish_alone(self) -> None:
        """Wait for this rank's writer without the others, as where the interpreter ends, and report a failure."""
        if self._settled or os.getpid() != self._owner:  # a fork of the run has nothing to wait for
            return
        self._settled = True
        problem = self._writer.outcome(leave=True)
        if problem is not None:
            logger.error("%s", problem)
