"""Where checkpoints are, and what unfinished saves left beside them. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from accel_parallel.checkpoint.folder import Folder
from accel_parallel.checkpoint.layout import NUMBERED
from accel_parallel.checkpoint.location import Location, as_location, child, is_remote
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, Manifest
from accel_parallel.checkpoint.owner import host_name, is_held, lives
from accel_parallel.checkpoint.shelf import shelf_of
from accel_parallel.checkpoint.staging import folder_of
from accel_state.errors import CheckpointError

__all__ = ["BELOW", "Place", "State", "find_checkpoint", "survey"]

State = Literal["complete", "damaged", "incomplete", "being written", "left behind", "set aside", "of another host"]
"""``left behind``: nobody will ever finish or read it. ``set aside``: complete, but the crash of a save took its name;
the next load or save gives it back."""

BELOW = "checkpoints"
"""Folder of a project that its checkpoints lie in."""

_TEMPORARY = re.compile(r"\..+\.tmp-(.+)-([0-9]+)-[0-9a-f]{8}")
_ASIDE = re.compile(r"\.(.+)\.previous")
_REMOVED = re.compile(r"\..+\.removed")
_NUM_REQUESTS = 16
"""Manifests of an object store that are fetched at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """One folder that is a checkpoint, or was to become one."""

    location: Location
    state: State
    manifest: Manifest | None = None
    """Where it is complete."""
    problem: str = ""
    """What is wrong with a damaged one."""
    written_s: float | None = None
    """When its manifest, or else the folder, was last written: seconds since 1970. Object stores do not say."""
    is_latest: bool = False
    """Whether ``load_state()`` without a folder takes it."""

    @property
    def name(self) -> str:
        """Of the folder."""
        return str(self.location).rstrip("/").rpartition("/")[2]

    @property
    def folder(self) -> str:
        """What it lies in."""
        return str(self.location).rstrip("/").rpartition("/")[0]

    @property
    def number(self) -> int | None:
        """Of an automatically named one."""
        aside = _ASIDE.fullmatch(self.name)
        found = NUMBERED.fullmatch(aside[1] if aside else self.name)
        return int(found[1]) if found else None

    @property
    def is_complete(self) -> bool:
        """Whether it can be loaded, at once or after its name was given back."""
        return self.state in ("complete", "set aside")

    @property
    def size_bytes(self) -> int | None:
        """Of its files, as its manifest says."""
        return None if self.manifest is None else sum(each.size_bytes for each in self.manifest.files.values())


def find_checkpoint(location: str) -> Folder:
    """The checkpoint that is meant: the folder itself, or the latest complete one of a run.

    Raises:
        CheckpointError: if there is none.
    """
    folder = folder_of(location)
    if folder.holds(MANIFEST_NAME):
        return folder
    latest = next((place for place in survey(location) if place.is_latest), None)
    if latest is None:
        raise CheckpointError(
            f"`{location}` holds no `{MANIFEST_NAME}`, so it is no complete checkpoint, and no complete "
            f"`checkpoint_<n>` lies in it. `accel checkpoint ls {location}` shows what does; give one of those."
        )
    return folder_of(latest.location)


def survey(location: Location) -> list[Place]:
    """Checkpoints and leftovers of a run, by number and name. Reads manifests, and nothing else of a checkpoint.

    Args:
        location: one checkpoint, the folder that they lie in, or the `project_dir` above that. Of an object store,
            numbered and complete ones are found.

    Raises:
        CheckpointError: if it is no folder.
    """
    place = as_location(location)
    if isinstance(place, Path) and not place.is_dir():
        raise CheckpointError(f"`{location}` is no folder, so no checkpoint is there. Check how it is written.")
    if folder_of(place).holds(MANIFEST_NAME):
        return [found for found in [_checkpoint(place)] if found is not None]
    found: list[Place] = []
    for each in (place, child(place, BELOW)):
        places = _local(each) if isinstance(each, Path) else _remote(each)
        found += _with_latest(sorted((place for place in places if place is not None), key=_order))
    return found


def _remote(location: str) -> list[Place | None]:
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        return list(pool.map(_checkpoint, [each for _, each in shelf_of(location).complete()]))


def _local(folder: Path) -> Iterator[Place | None]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            yield _hidden(path)
        elif (path / MANIFEST_NAME).is_file():
            yield _checkpoint(path)
        elif NUMBERED.fullmatch(path.name) and path.is_dir():
            yield _unfinished(path, "incomplete")


def _hidden(path: Path) -> Place | None:
    temporary = _TEMPORARY.fullmatch(path.name)
    if temporary:
        state: State = "of another host"
        if temporary[1] == host_name():
            state = "being written" if lives(int(temporary[2])) or is_held(path) else "left behind"
        return _unfinished(path, state)
    if _REMOVED.fullmatch(path.name):
        return _unfinished(path, "left behind")
    aside = _ASIDE.fullmatch(path.name)
    if aside is None or not (path / MANIFEST_NAME).is_file():
        return None
    if (path.with_name(aside[1]) / MANIFEST_NAME).is_file():
        return _unfinished(path, "left behind")
    found = _checkpoint(path)
    return replace(found, state="set aside") if found is not None and found.state == "complete" else found


def _unfinished(path: Path, state: State) -> Place | None:
    try:
        return Place(path, state, written_s=path.stat().st_mtime)
    except FileNotFoundError:  # a save that is just ending
        return None


def _checkpoint(location: Location) -> Place | None:
    """``None`` for one that went while this looked, as the run itself removes old ones."""
    folder = folder_of(location)
    try:
        written_s = None if is_remote(location) else (Path(location) / MANIFEST_NAME).stat().st_mtime
        return Place(location, "complete", Manifest.read(folder), written_s=written_s)
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        gone = not folder.holds(MANIFEST_NAME)
        return None if gone else Place(location, "damaged", problem=str(error), written_s=written_s)


def _order(place: Place) -> tuple[bool, int, str]:
    """Numbered ones last, so that a terminal ends with the newest."""
    return (place.number is not None, place.number or 0, place.name)


def _with_latest(places: list[Place]) -> list[Place]:
    usable = [place for place in places if place.number is not None and place.is_complete]
    latest = usable[-1] if usable else None
    return [replace(place, is_latest=True) if place is latest else place for place in places]
