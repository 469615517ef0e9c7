"""Names of checkpoint folders: which number comes next, which is the latest, which may go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from accel_parallel.checkpoint.manifest import MANIFEST_NAME
from accel_state.errors import CheckpointError, ConfigError

__all__ = [
    "NUMBERED",
    "complete_checkpoints",
    "discard",
    "latest_checkpoint",
    "next_number",
    "numbered_path",
    "previous_path",
    "prune",
    "recover",
    "refuse_limit",
    "remove_tree",
]

NUMBERED = re.compile(r"checkpoint_([0-9]+)")
"""Name of an automatically named checkpoint."""
_ASIDE = re.compile(r"\.(checkpoint_([0-9]+))\.previous")


def numbered_path(folder: Path, number: int) -> Path:
    """The folder of an automatically named checkpoint."""
    return folder / f"checkpoint_{number}"


def previous_path(final: Path) -> Path:
    """Where a checkpoint waits while another takes its name."""
    return final.with_name(f".{final.name}.previous")


def recover(final: Path) -> None:
    """Put back the checkpoint that a crash left aside while another was taking its name. Main process only.

    Where the other one took it, the one aside goes. A folder that is neither, such as one with files of somebody
    else's, is left alone, and so is the checkpoint aside.
    """
    previous = previous_path(final)
    if not (previous / MANIFEST_NAME).is_file():
        return
    if (final / MANIFEST_NAME).is_file():
        discard(previous)
    elif not final.exists() or (final.is_dir() and not any(final.iterdir())):
        previous.rename(final)  # also in place of an empty folder, which a restarted script may have made


def discard(folder: Path) -> None:
    """Remove a checkpoint: out of sight by one rename first, since half of one must never look whole.

    What cannot be removed then waits under a hidden name for the next save, which tries again.
    """
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    remove_tree(hidden)
    folder.rename(hidden)
    remove_tree(hidden)


def remove_tree(path: Path) -> None:
    """Remove a folder, or a link to one, as far as possible."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The automatically named, complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = NUMBERED.fullmatch(path.name)
        if match and (path / MANIFEST_NAME).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest number; ``None`` where nothing was saved yet. Main process only.

    One that a crash left aside while another was taking its name is put back first.

    Raises:
        CheckpointError: if there are numbered folders and none is complete, which no save leaves behind.
    """
    if not folder.is_dir():
        return None
    for path in list(folder.iterdir()):
        aside = _ASIDE.fullmatch(path.name)
        if aside:
            recover(folder / aside[1])
    complete = complete_checkpoints(folder)
    if complete:
        return complete[-1][1]
    broken = sorted(path.name for path in folder.iterdir() if NUMBERED.fullmatch(path.name) and path.is_dir())
    if broken:
        raise CheckpointError(
            f"`{folder}` holds {', '.join(broken)}, and none of them has a `{MANIFEST_NAME}`, so none is complete. "
            f"Restore one from a backup, or remove them to start anew."
        )
    return None


def next_number(folder: Path) -> int:
    """One more than any number in use, complete or not, so that no name is taken twice after a resume."""
    if not folder.is_dir():
        return 0
    names = [path.name for path in folder.iterdir()]
    numbers = [int(match[1]) for name in names if (match := NUMBERED.fullmatch(name))]
    numbers += [int(match[2]) for name in names if (match := _ASIDE.fullmatch(name))]
    return max(numbers, default=-1) + 1


def prune(folder: Path, *, total_limit: int, keep: Iterable[Path] = ()) -> list[Path]:
    """Remove the oldest complete checkpoints until `total_limit` are left. Main process only, after a commit.

    Args:
        folder: holds the numbered checkpoints.
        total_limit: how many may stay, at least one.
        keep: paths that stay whatever their age, such as the one that was resumed from.

    Returns:
        What was removed.
    """
    refuse_limit(total_limit)
    protected = {path.resolve() for path in keep}
    complete = [path for _, path in complete_checkpoints(folder)]
    surplus = [path for path in complete[: max(0, len(complete) - total_limit)] if path.resolve() not in protected]
    for path in surplus:
        discard(path)
    return surplus


def refuse_limit(total_limit: int) -> None:
    """
    Raises:
        ConfigError: if no checkpoint may stay.
    """
    if total_limit < 1:
        raise ConfigError(
            f"`total_limit={total_limit}` would remove the checkpoint that was just written. Allow at least one, or "
            f"leave the limit out to keep all."
        )
