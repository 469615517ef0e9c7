"""Which folders hold checkpoints, and what unfinished saves left beside them. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from accel_parallel.checkpoint.folder import Folder, LocalFolder
from accel_parallel.checkpoint.layout import previous_path
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, Manifest
from accel_parallel.checkpoint.owner import host_name, lives
from accel_state.errors import CheckpointError

__all__ = ["Place", "State", "find_checkpoint", "open_folder", "survey"]

State = Literal["complete", "damaged", "incomplete", "being written", "left behind", "set aside", "of another host"]
"""``left behind``: nobody will ever finish or read it. ``set aside``: complete, but the crash of a save took its name;
the next load or save gives it back."""

_NUMBERED = re.compile(r"\.?checkpoint_([0-9]+)(\.previous)?")
_TEMPORARY = re.compile(r"\..+\.tmp-(.+)-([0-9]+)-[0-9a-f]{8}")
_ASIDE = re.compile(r"\.(.+)\.previous")
_REMOVED = re.compile(r"\..+\.removed")


@dataclass(frozen=True, slots=True)
class Place:
    """One folder that is a checkpoint, or was to become one."""

    path: Path
    state: State
    manifest: Manifest | None = None
    """Where it is complete."""
    problem: str = ""
    """What is wrong with a damaged one."""
    written_s: float = 0.0
    """When its manifest, or else the folder, was last written: seconds since 1970."""
    is_latest: bool = False
    """Whether ``load_state()`` without a folder takes it."""

    @property
    def number(self) -> int | None:
        """Of an automatically named one."""
        found = _NUMBERED.fullmatch(self.path.name)
        return int(found[1]) if found else None

    @property
    def size_bytes(self) -> int | None:
        """Of its files, as its manifest says."""
        return None if self.manifest is None else sum(each.size_bytes for each in self.manifest.files.values())


def open_folder(location: str | Path) -> Folder:
    """The folder of one checkpoint, as a user writes it."""
    return LocalFolder(location)


def find_checkpoint(location: str) -> Folder:
    """The checkpoint that is meant: the folder itself, or the latest complete one of a run.

    Raises:
        CheckpointError: if there is none.
    """
    folder = Path(location)
    if (folder / MANIFEST_NAME).is_file():
        return open_folder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"`{location}` is no folder, so it holds no checkpoint. Check how it is written.")
    for place in survey(folder):
        if place.is_latest:
            return open_folder(place.path)
    raise CheckpointError(
        f"`{location}` holds no `{MANIFEST_NAME}`, so it is no complete checkpoint, and no complete `checkpoint_<n>` "
        f"lies in it. `accel checkpoint ls {location}` shows what does; give one of those."
    )


def survey(folder: Path) -> list[Place]:
    """Checkpoints and leftovers of a run, by number and name. Reads manifests, and nothing else of a checkpoint.

    Args:
        folder: one checkpoint, the folder that they lie in, or the `project_dir` above that.

    Raises:
        CheckpointError: if it is no folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is no folder, so there is nothing to list. Check how it is written.")
    if (folder / MANIFEST_NAME).is_file():
        return [_checkpoint(folder)]
    found = []
    for place in (folder, folder / "checkpoints"):
        if place.is_dir():
            found += _with_latest(sorted(_places(place), key=_order))
    return found


def _places(folder: Path) -> Iterator[Place]:
    for path in folder.iterdir():
        name = path.name
        if name.startswith("."):
            found = _hidden(path)
            if found is not None:
                yield found
        elif (path / MANIFEST_NAME).is_file():
            yield _checkpoint(path)
        elif _NUMBERED.fullmatch(name) and path.is_dir():
            yield Place(path, "incomplete", written_s=path.stat().st_mtime)


def _hidden(path: Path) -> Place | None:
    temporary = _TEMPORARY.fullmatch(path.name)
    if temporary:
        state: State = "of another host"
        if temporary[1] == host_name():
            state = "being written" if lives(int(temporary[2])) else "left behind"
        return _unfinished(path, state)
    if _REMOVED.fullmatch(path.name):
        return _unfinished(path, "left behind")
    aside = _ASIDE.fullmatch(path.name)
    if aside is None or not (path / MANIFEST_NAME).is_file():
        return None
    final = path.with_name(aside[1])
    assert previous_path(final) == path
    if (final / MANIFEST_NAME).is_file():
        return _unfinished(path, "left behind")
    found = _checkpoint(path)
    return replace(found, state="set aside") if found.state == "complete" else found


def _unfinished(path: Path, state: State) -> Place | None:
    try:
        return Place(path, state, written_s=path.stat().st_mtime)
    except FileNotFoundError:  # a save that is just ending
        return None


def _checkpoint(path: Path) -> Place:
    try:
        manifest = Manifest.read(open_folder(path))
        return Place(path, "complete", manifest, written_s=(path / MANIFEST_NAME).stat().st_mtime)
    except CheckpointError as error:
        return Place(path, "damaged", problem=str(error), written_s=path.stat().st_mtime)


def _order(place: Place) -> tuple[bool, int, str]:
    """Numbered ones last, so that a terminal ends with the newest."""
    return (place.number is not None, place.number or 0, place.path.name)


def _with_latest(places: list[Place]) -> list[Place]:
    usable = [place for place in places if place.number is not None and place.state in ("complete", "set aside")]
    latest = usable[-1].path if usable else None
    return [replace(place, is_latest=True) if place.path == latest else place for place in places]
