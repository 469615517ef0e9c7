"""How a new checkpoint takes its name in a file system: a temporary folder, one rename.

A folder with contents cannot be replaced by one rename everywhere. So where a checkpoint of that name is there, it
first steps aside as ``.<name>.previous``; between the two renames it waits there, complete, for `recover`.

Imports no torch: the process that writes in the background has none.
"""

from __future__ import annotations

import re
import secrets
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from accel_parallel.checkpoint.folder import Folder, LocalFolder, sync_to_disk
from accel_parallel.checkpoint.layout import discard, previous_path, recover, remove_tree
from accel_parallel.checkpoint.location import Location, is_remote, local_path
from accel_parallel.checkpoint.manifest import MANIFEST_NAME
from accel_parallel.checkpoint.owner import hold, host_name, is_held, lives
from accel_state.errors import CheckpointError

__all__ = ["FAILURES", "LocalStaging", "Staging", "folder_of", "staging_of"]

FAILURES = (OSError, CheckpointError, RuntimeError, TypeError, ValueError, MemoryError)
"""What writing may raise, devices and odd states included. A rank that left with any of these instead of reporting it
would keep its peers waiting."""


class Staging(Protocol):
    """Where a new checkpoint gathers until it takes its name."""

    @property
    def location(self) -> str:
        """What it will be called."""

    @property
    def in_process(self) -> bool:
        """Whether no other process would see the checkpoint."""

    def begin(self, pid: int) -> str:
        """Main process only. Make room, for as long as process `pid` lives; returns what the others find it by.

        Raises:
            CheckpointError: if something is there that is no checkpoint.
            OSError: whatever the disk says.
        """

    def folder(self, token: str) -> Folder:
        """Where every rank writes its files."""

    def hold(self, token: str) -> AbstractContextManager[None]:
        """While open, nobody takes it for what a dead run left, though the run that began it may be gone."""

    def remove(self, token: str, name: str) -> None:
        """Main process only. Take out a file that the checkpoint is not to hold."""

    def publish(self, token: str, manifest: str, *, sync: bool) -> None:
        """Main process only. Write the manifest and let the checkpoint take its name; what it replaces goes then."""

    def abandon(self, token: str) -> None:
        """Main process only. Remove what was written, as far as possible; does nothing after `publish`."""


def staging_of(final: Location) -> Staging:
    """Where a checkpoint of that name gathers."""
    if is_remote(final):
        from accel_parallel.checkpoint.remote import RemoteStaging

        return RemoteStaging(str(final))
    return LocalStaging(local_path(final))


def folder_of(location: Location) -> Folder:
    """The folder of the checkpoint that a path or a URL names."""
    if is_remote(location):
        from accel_parallel.checkpoint.remote import RemoteFolder

        return RemoteFolder(str(location))
    return LocalFolder(local_path(location))


class LocalStaging:
    """Beside the final folder, under a name that nobody reads."""

    def __init__(self, final: Path) -> None:
        # What a link names is replaced, on the disk where it lies, and the link stays.
        # Absolute, since a save in the background may outlast the working directory.
        self.final = final.resolve() if final.is_symlink() else final.absolute()

    @property
    def location(self) -> str:
        return str(self.final)

    @property
    def in_process(self) -> bool:
        return False

    def begin(self, pid: int) -> str:
        final = self.final
        if final.exists() and not (final / MANIFEST_NAME).is_file() and (not final.is_dir() or any(final.iterdir())):
            raise CheckpointError(
                f"`{final}` exists and is no checkpoint, and writing one there would destroy it. Name another folder."
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        recover(final)
        _remove_leftovers(final)
        temporary = final.with_name(f".{final.name}.tmp-{host_name()}-{pid}-{secrets.token_hex(4)}")
        temporary.mkdir()
        return str(temporary)

    def folder(self, token: str) -> Folder:
        return LocalFolder(token)

    def hold(self, token: str) -> AbstractContextManager[None]:
        return hold(Path(token))

    def remove(self, token: str, name: str) -> None:
        (Path(token) / name).unlink(missing_ok=True)

    def publish(self, token: str, manifest: str, *, sync: bool) -> None:
        LocalFolder(token).write(MANIFEST_NAME, [manifest.encode()], sync=sync)
        if sync:
            sync_to_disk(Path(token))
        _take_name(Path(token), self.final, sync=sync)

    def abandon(self, token: str) -> None:
        remove_tree(Path(token))


def _take_name(temporary: Path, final: Path, *, sync: bool) -> None:
    """Let the new checkpoint take its name, for good. Only afterwards the one that it replaces may go."""
    if not (final / MANIFEST_NAME).is_file():
        temporary.rename(final)  # nothing is there, or an empty folder
        if sync:
            sync_to_disk(final.parent)
        return
    previous = previous_path(final)
    final.rename(previous)
    try:
        temporary.rename(final)
    finally:
        if not final.exists():  # refused or interrupted
            previous.rename(final)
    if sync:
        sync_to_disk(final.parent)
    discard(previous)


def _remove_leftovers(final: Path) -> None:
    """Remove temporary folders of processes of this host that are gone, and half-removed checkpoints."""
    for path in final.parent.glob(".*.tmp-*"):
        match = re.fullmatch(r"\..*\.tmp-(.+)-([0-9]+)-[0-9a-f]{8}", path.name)
        if match and match[1] == host_name() and not lives(int(match[2])) and not is_held(path):
            _discard_leftover(path)
    for pattern in (".checkpoint_*.removed", ".*.tmp-*.removed"):
        for path in final.parent.glob(pattern):
            remove_tree(path)
    remove_tree(final.with_name(f".{final.name}.previous.removed"))


def _discard_leftover(path: Path) -> None:
    """Out of sight by one rename first: a writer that outlived its run may be about to let it take its name."""
    with suppress(OSError):  # it has taken it meanwhile, another run was faster, or it cannot be removed
        discard(path)
