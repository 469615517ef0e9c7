"""Where a run keeps its files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from accel_parallel.checkpoint.location import Location, as_location, child, is_remote
from accel_state.config import RunConfig
from accel_state.errors import ConfigError

__all__ = ["ProjectConfiguration", "settled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectConfiguration:
    """Folders of a run, and how its checkpoints are named and kept."""

    project_dir: str | Path | None = None
    """Root of everything that the run writes: a path, or the URL of an object store that `fsspec` knows, as text."""
    logging_dir: str | Path | None = None
    """Folder for trackers, a path; by default `project_dir` where that is one."""
    automatic_checkpoint_naming: bool = True
    """Whether ``save_state()`` without a folder writes ``<project_dir>/checkpoints/checkpoint_<n>``."""
    total_limit: int | None = None
    """Automatically named checkpoints that are kept, besides the one resumed from; the oldest go after a new one is
    complete. ``None`` keeps all."""
    iteration: int | None = None
    """Number of the first automatically named checkpoint; by default one more than any that is there."""
    sync_to_disk: bool = True
    """Whether a save flushes its files to the disk before they count. Without it saving is faster, and a crash of the
    machine, never one of the process, may leave the latest checkpoint damaged, which loading it tells."""

    def __post_init__(self) -> None:
        for name, least in (("total_limit", 1), ("iteration", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(
                    f"`{name}={value!r}` cannot count checkpoints. Give an integer of at least {least}, or leave it "
                    "out."
                )
        if not self.automatic_checkpoint_naming and (self.total_limit is not None or self.iteration is not None):
            raise ConfigError(
                "`total_limit` and `iteration` only concern automatically named checkpoints, and "
                "`automatic_checkpoint_naming=False` turns those off. Leave them out, or turn it on."
            )
        if self.logging_dir is not None and is_remote(self.logging_dir):
            raise ConfigError(
                f"`logging_dir={str(self.logging_dir)!r}` is a URL, and trackers write to files of this machine. Give "
                f"a path."
            )
        if not self.sync_to_disk and self.project_dir is not None and is_remote(self.project_dir):
            raise ConfigError(
                f"`sync_to_disk=False` concerns a disk, and `project_dir={str(self.project_dir)!r}` is an object "
                f"store, which keeps what it has taken. Leave it out."
            )

    @property
    def checkpoints_dir(self) -> Location | None:
        """Where automatically named checkpoints lie; ``None`` without a project folder."""
        return None if self.project_dir is None else child(self.project_dir, "checkpoints")

    @property
    def tracking_dir(self) -> Path | None:
        """Where trackers write; ``None`` where nothing but the URL of an object store was given."""
        for folder in (self.logging_dir, self.project_dir):
            if folder is not None and isinstance(found := as_location(folder), Path):
                return found
        return None


def settled(given: ProjectConfiguration | None, config: RunConfig) -> ProjectConfiguration:
    """The folders of a run, from a configuration and the run's settings.

    Raises:
        ConfigError: if they name two folders.
    """
    if given is None:
        return ProjectConfiguration(project_dir=config.project_dir)
    if config.project_dir is None or given.project_dir == config.project_dir:
        return given
    if given.project_dir is not None:
        raise ConfigError(
            f"`project_dir={config.project_dir!r}` ({config.source('project_dir')}) and a `project_config` with "
            f"`project_dir={str(given.project_dir)!r}` name two folders. Give one of them."
        )
    return replace(given, project_dir=config.project_dir)
