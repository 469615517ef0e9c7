"""The folder that numbered checkpoints of a run lie in, wherever it is.

Imports no torch: the process that writes in the background has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from accel_parallel.checkpoint import layout
from accel_parallel.checkpoint.location import Location, is_remote, local_path

__all__ = ["LocalShelf", "Shelf", "recover_at", "shelf_of"]


class Shelf(Protocol):
    """Numbered checkpoints. What it gives are locations as `Checkpoint` and `save_checkpoint` take them."""

    @property
    def location(self) -> Location:
        """As a user writes it."""

    def numbered(self, number: int) -> Location:
        """Where the checkpoint of that number is, or is to be."""

    def holds(self, number: int) -> bool:
        """Whether anything is there, complete or not."""

    def complete(self) -> list[tuple[int, Location]]:
        """Complete checkpoints, oldest first."""

    def latest(self) -> Location | None:
        """The complete checkpoint with the highest number; ``None`` where nothing was saved yet. Main process only.

        Raises:
            CheckpointError: if there are numbered checkpoints and none is complete, which no save leaves behind.
        """

    def next_number(self) -> int:
        """One more than any number in use, complete or not, so that no name is taken twice after a resume."""

    def prune(self, *, total_limit: int, keep: Iterable[Location] = ()) -> list[Location]:
        """Remove the oldest complete checkpoints until `total_limit` are left. Main process only, after a commit.

        Args:
            total_limit: how many may stay, at least one.
            keep: those that stay whatever their age, such as the one that was resumed from.

        Returns:
            What was removed.
        """


def shelf_of(location: Location) -> Shelf:
    """The numbered checkpoints of a path, or of a URL such as ``s3://bucket/run/checkpoints``."""
    if is_remote(location):
        from accel_parallel.checkpoint.remote_shelf import RemoteShelf

        return RemoteShelf(str(location))
    return LocalShelf(local_path(location))


def recover_at(location: Location) -> None:
    """Put back what a crash left aside while another checkpoint was taking its name. Main process only.

    In an object store nothing steps aside.
    """
    if not is_remote(location):
        layout.recover(local_path(location))


class LocalShelf:
    """A folder of a file system that this machine has mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def location(self) -> Location:
        return self.path

    def numbered(self, number: int) -> Location:
        return layout.numbered_path(self.path, number)

    def holds(self, number: int) -> bool:
        return layout.numbered_path(self.path, number).exists()

    def complete(self) -> list[tuple[int, Location]]:
        return [(number, path) for number, path in layout.complete_checkpoints(self.path)]

    def latest(self) -> Location | None:
        return layout.latest_checkpoint(self.path)

    def next_number(self) -> int:
        return layout.next_number(self.path)

    def prune(self, *, total_limit: int, keep: Iterable[Location] = ()) -> list[Location]:
        kept = [local_path(each) for each in keep if not is_remote(each)]
        return [*layout.prune(self.path, total_limit=total_limit, keep=kept)]
