"""Trackers by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, Union

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError
from accel_state.protocols import Tracker
from accel_track.jsonl import JsonlTracker

__all__ = ["LogWith", "TRACKER_GROUP", "make_trackers", "tracker_names"]

TRACKER_GROUP = "accel.trackers"
"""Entry-point group by which other packages add trackers.

Each is a class (or function) that gives a tracker, called without arguments, or with the folder to write into if it has
a true ``requires_logging_directory``.
"""

LogWith = Union[None, str, Tracker, type, "Iterable[str | Tracker | type]"]
"""What names trackers: names, ``"all"``, trackers made by the user, classes of such."""

_logger = logging.getLogger(__name__)


def tracker_names() -> list[str]:
    """Every name that `make_trackers` knows here: those of this package, then those of other installed ones."""
    return list(_known())


def make_trackers(log_with: LogWith, directory: str | os.PathLike[str] | None = None) -> list[Tracker]:
    """The trackers that `log_with` asks for, not started yet. Call it on the main process only.

    Args:
        log_with: a name, a tracker, a class of trackers, or several of these; ``"all"`` for every one that is
            installed, in which those whose package is missing are left out with a line in the log.
        directory: the folder that trackers write into which keep files.

    Raises:
        ConfigError: if a name is unknown, an object is no tracker, or a tracker needs a folder and has none.
        ImportError: if a tracker was asked for by its name, and its package is not installed.
    """
    if log_with is None:
        return []
    asked = [log_with] if isinstance(log_with, str | type) or not isinstance(log_with, Iterable) else list(log_with)
    made: list[Tracker] = []
    for each in asked:
        if isinstance(each, str) and str(each) == "all":
            made += [tracker for name in _known() for tracker in _if_installed(name, directory)]
        elif isinstance(each, str):
            made.append(_by_name(each, directory))
        else:
            made.append(_checked(_create(each, each.__name__, directory) if isinstance(each, type) else each))
    return made


def _known() -> dict[str, Callable[[], Any]]:
    """By name, what loads the class. Those of this package come first and cannot be replaced."""
    known: dict[str, Callable[[], Any]] = {"jsonl": lambda: JsonlTracker}
    for each in entry_points(group=TRACKER_GROUP):
        known.setdefault(each.name, each.load)
    return known


def _by_name(name: str, directory: str | os.PathLike[str] | None) -> Tracker:
    known = _known()
    if name not in known:
        raise ConfigError(
            f"`log_with={name!r}` names no tracker that is installed here.{did_you_mean(name, list(known))} Use one of "
            f"{', '.join(known)}, 'all', or a tracker of your own; packages add theirs in the group `{TRACKER_GROUP}`."
        )
    return _checked(_create(known[name](), name, directory))


def _if_installed(name: str, directory: str | os.PathLike[str] | None) -> list[Tracker]:
    try:
        return [_by_name(name, directory)]
    except ImportError as error:
        _logger.info("log_with='all' leaves the tracker %r out, because its package is missing: %s", name, error)
        return []


def _create(make: Callable[..., Any], name: str, directory: str | os.PathLike[str] | None) -> Any:
    if not getattr(make, "requires_logging_directory", False):
        return make()
    if directory is None:
        raise ConfigError(
            f"The tracker {name!r} writes files, but no folder was given to write into. "
            f"Give one with `project_dir` or `logging_dir`, which is no URL, or leave the tracker out of `log_with`."
        )
    return make(directory)


def _checked(tracker: Any) -> Tracker:
    if isinstance(tracker, Tracker):
        return tracker
    missing = [name for name in ("name", "start", "log", "finish") if not hasattr(tracker, name)]
    raise ConfigError(
        f"A {type(tracker).__name__} was given in `log_with`, which is no tracker: it has no {', '.join(missing)}. "
        f"Derive it from `accel_track.GeneralTracker`, or give the name of a tracker, such as 'jsonl'."
    )
