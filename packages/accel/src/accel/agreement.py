"""All ranks do something, or none goes on as if they had."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accel_parallel.checkpoint.shelf import Shelf
from accel_parallel.checkpoint.staging import FAILURES
from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import CheckpointError
from accel_state.process import Process

__all__ = ["agree", "all_or_none", "ask_main"]

_T = TypeVar("_T")


def all_or_none(action: Callable[[], _T], what: str, process: Process) -> _T:
    """Do it on every rank. Where that raises on one, which it does as it would, the others raise too.

    Every rank must call this: otherwise those without an error would go on into an exchange that the other never
    comes to.
    """
    done = False
    try:
        found = action()
        done = True
    finally:
        told = gather_object([(process.topology.rank, done)], process=process)
    failed = [rank for rank, did in told if not did]
    if failed:
        raise CheckpointError(f"{what} on rank(s) {failed}, whose output tells why. Correct that, then try again.")
    return found


def agree(read: Callable[[], _T], process: Process) -> _T:
    """Read on every rank; where that fails on any, all raise, so that none goes on alone with other weights."""
    outcome: list[_T] = []
    problem: str | None = None
    try:
        outcome.append(read())
    except CheckpointError as error:
        problem = str(error)
    except FAILURES as error:
        problem = (
            f"Rank {process.topology.rank} could not read the checkpoint ({error}), so nothing was restored. "
            f"Check that every process sees the folder, or load another checkpoint."
        )
    problems = [each for each in gather_object([problem], process=process) if each is not None]
    if problems:
        raise CheckpointError(problems[0])
    return outcome[0]


def ask_main(shelf: Shelf, question: Callable[[], _T], process: Process) -> _T:
    """The answer of the main process to what is on a shelf. Every rank must call this; where that fails, all raise."""
    outcome: list[tuple[list[_T], str]] = [([], "")]
    if process.topology.is_main:
        try:
            outcome = [([question()], "")]
        except CheckpointError as error:
            outcome = [([], str(error))]
        except OSError as error:
            problem = (
                f"What checkpoints are in `{shelf.location}` could not be found out ({type(error).__name__}: "
                f"{error}). Make it readable by the main process, then call this again."
            )
            outcome = [([], problem)]
    answer, problem = broadcast_object_list(outcome, process=process)[0]
    if not answer:
        raise CheckpointError(problem)
    return answer[0]
