"""Saving and restoring everything that a run is made of, strictly and all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel.agreement import agree, all_or_none, ask_main
from accel.contents import Contents
from accel.project import ProjectConfiguration
from accel_parallel import checkpoint as files
from accel_parallel.checkpoint.location import Location, as_location
from accel_parallel.checkpoint.shelf import Shelf, recover_at, shelf_of
from accel_parallel.checkpoint.staging import FAILURES
from accel_state.collectives import broadcast_object_list
from accel_state.errors import CheckpointError, ConfigError
from accel_state.logging import get_logger
from accel_state.rng import rng_state, set_rng_state

__all__ = ["Saving"]

logger = get_logger(__name__)

SaveHook = Callable[[list[Any], list[dict[str, Any]], str], None]
LoadHook = Callable[[list[Any], str], None]


class Saving:
    """The checkpoints of one `Accelerator`."""

    def __init__(self, contents: Contents, project: ProjectConfiguration) -> None:
        self.contents = contents
        self.process = contents.process
        self.project = project
        self.save_hooks: list[SaveHook] = []
        self.load_hooks: list[LoadHook] = []
        self._background: files.BackgroundSaver | None = None
        """Made, and its modules loaded, by the first save in the background."""
        self._resumed_from: Location | None = None
        self._num_named = 0
        """Automatically named checkpoints that this run has written."""

    def save(self, output_dir: str | Path | None, if_busy: str) -> Location:
        """Write a checkpoint. Every rank must call this. Returns its folder."""
        if if_busy != "wait":
            raise ConfigError(
                f"`if_busy={if_busy!r}` was given to a save that blocks, which is what was asked for and is written. "
                f"Add `blocking=False`, or leave it out."
            )
        self.settle()
        final = self._save_path(output_dir)
        files.save_checkpoint(final, self._gathered(final), process=self.process, **self._about())
        self._prune(automatic=output_dir is None)
        return final

    def begin_save(self, output_dir: str | Path | None, if_busy: str) -> files.PendingSave:
        """Copy everything, and write it in the background. Every rank must call this.

        Raises:
            ConfigError: for another `if_busy`.
        """
        if if_busy not in ("wait", "skip"):
            raise ConfigError(
                f"`if_busy={if_busy!r}` is no way to treat a save that is still going on. Give 'wait', which waits for "
                f"it and then saves, or 'skip', which leaves this one out."
            )
        if self._background is None:
            self._background = files.BackgroundSaver(self.process)
        if if_busy == "skip" and self._background.is_busy and self._background.pending is not None:
            return self._background.pending
        self.settle()
        final = self._save_path(output_dir)
        prune = self._pruning() if output_dir is None else None
        pending = self._background.save(final, self._gathered(final), prune=prune, **self._about())
        self._num_named += output_dir is None
        return pending

    def settle(self) -> None:
        """Wait for a save in the background. Every rank must call this.

        Raises:
            CheckpointError: on every rank, if it failed; once.
        """
        if self._background is not None:
            self._background.settle()

    def close(self) -> None:
        """Wait for a save in the background, and give its memory back. Every rank must call this."""
        try:
            self.settle()
        finally:
            if self._background is not None:
                self._background.close()

    def _gathered(self, final: Location) -> list[files.Item]:
        """Every rank must call this. What this rank gives to a checkpoint; where that fails on any, all raise."""
        return all_or_none(lambda: self._items(final), "What is to be saved could not be put together", self.process)

    def _items(self, final: Location) -> list[files.Item]:
        items = self.contents.items()
        for hook in self.save_hooks:
            hook(list(self.contents.engine.models), [item.state for item in items if item.kind == "model"], str(final))
        return [*items, files.Item(f"rng_{self.process.topology.rank}", "rng", rng_state(self.process.kind))]

    def _about(self) -> dict[str, Any]:
        engine, strategy = self.contents.engine, self.contents.engine.strategy
        return {
            "step": max((optimizer.steps_taken for optimizer in engine.optimizers), default=0),
            "strategy": strategy.name,
            "sync": self.project.sync_to_disk,
            "spread": strategy.state_layout != "full",
        }

    def _pruning(self) -> dict[str, Any] | None:
        """What a save in the background may remove once it is complete."""
        folder, limit = self.project.checkpoints_dir, self.project.total_limit
        if limit is None or folder is None:
            return None
        keep = [] if self._resumed_from is None else [str(self._resumed_from)]
        return {"folder": str(folder), "total_limit": limit, "keep": keep}

    def load(self, input_dir: str | Path | None, *, strict: bool = True) -> Location | None:
        """Restore a checkpoint, the latest by default. Every rank must call this.

        Returns:
            The folder it came from; ``None`` where none was asked for and nothing was saved yet.
        """
        self.settle()
        folder = self._load_path(input_dir)
        if folder is None:
            return None
        # Everything is proved, each file by one rank, and then read, before anything is changed on any.
        checkpoint = agree(lambda: self._proved(folder, strict=strict), self.process)
        states, generators, step = agree(lambda: self._read(checkpoint, strict=strict), self.process)
        waived = all_or_none(
            lambda: self._take(checkpoint, states, str(folder), strict=strict),
            "The checkpoint was read, and not all of it could be restored",
            self.process,
        )
        self.contents.engine.restart()
        if generators is not None:
            set_rng_state(generators, strict_device=False)
        self._resumed_from = folder
        self.process.barrier()
        if waived:
            logger.warning("Restored from %s, but for this: %s.", folder, "; ".join(waived))
        logger.info("Resumed from %s, step %d.", folder, step)
        return folder

    def _take(self, checkpoint: files.Checkpoint, states: dict[str, Any], folder: str, *, strict: bool) -> list[str]:
        """Call hooks and give each object its state. Returns what is waived."""
        for hook in self.load_hooks:
            hook(list(self.contents.engine.models), folder)
        waived = [] if strict else self.contents.fit(checkpoint, states)
        self.contents.restore(states)
        return waived

    def _proved(self, folder: Location, *, strict: bool) -> files.Checkpoint:
        checkpoint = files.Checkpoint(folder)
        if strict:
            self.contents.refuse_other_items(checkpoint)
        topology = self.process.topology
        checkpoint.verify(share=topology.rank, num_shares=topology.world_size)
        return checkpoint

    def _read(self, checkpoint: files.Checkpoint, *, strict: bool) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
        lazy = {name for name, record in checkpoint.items.items() if record.kind in ("model", "optimizer")}
        names = [name for name in self.contents.names() if name in checkpoint.items]
        states = {name: checkpoint.read(name, lazy=name in lazy, verify=False) for name in names}
        return states, self._read_generators(checkpoint, strict=strict), checkpoint.manifest.step

    def _read_generators(self, checkpoint: files.Checkpoint, *, strict: bool) -> dict[str, Any] | None:
        if checkpoint.manifest.world_size != self.process.topology.world_size:
            logger.warning(
                "The checkpoint was written by %d process(es) and is read by %d: random generators are not restored, "
                "since their streams belong to ranks. The order of the data is.",
                checkpoint.manifest.world_size,
                self.process.topology.world_size,
            )
            return None
        name = f"rng_{self.process.topology.rank}"
        if not strict and name not in checkpoint.items:
            return None
        state: dict[str, Any] = checkpoint.read(name, verify=False)
        return state

    def _save_path(self, output_dir: str | Path | None) -> Location:
        if output_dir is not None:
            return as_location(output_dir)
        shelf = self._shelf("save_state()")
        number = self.project.iteration if self._num_named == 0 else None
        if number is None:
            return shelf.numbered(ask_main(shelf, shelf.next_number, self.process))
        if ask_main(shelf, lambda: shelf.holds(number), self.process):
            raise ConfigError(
                f"`ProjectConfiguration(iteration={number})` names `{shelf.numbered(number)}`, which exists. "
                f"Leave `iteration` out to go on after the highest number, or remove that folder."
            )
        return shelf.numbered(number)

    def _shelf(self, call: str) -> Shelf:
        folder = self.project.checkpoints_dir
        if folder is None:
            raise ConfigError(
                f"`{call}` was called without a folder, and the Accelerator has no `project_dir` to look in. "
                f"Pass a folder, or create `Accelerator(project_dir=...)`."
            )
        if not self.project.automatic_checkpoint_naming:
            raise ConfigError(
                f"`{call}` was called without a folder, and `automatic_checkpoint_naming=False` leaves naming to you. "
                f"Pass a folder, or turn it on."
            )
        return shelf_of(folder)

    def _load_path(self, input_dir: str | Path | None) -> Location | None:
        if input_dir is not None:
            folder = as_location(input_dir)
            if self.process.topology.is_main:
                recover_at(folder)
            self.process.barrier()
            return folder
        shelf = self._shelf("load_state()")
        latest = ask_main(shelf, shelf.latest, self.process)
        if latest is None:
            logger.warning("No checkpoint under %s yet: starting from the beginning.", shelf.location)
        return latest

    def _prune(self, *, automatic: bool) -> None:
        if not automatic:
            return
        self._num_named += 1
        folder, limit = self.project.checkpoints_dir, self.project.total_limit
        if limit is None or folder is None:
            return
        problem: str | None = None
        if self.process.topology.is_main:
            keep = [] if self._resumed_from is None else [self._resumed_from]
            try:
                shelf_of(folder).prune(total_limit=limit, keep=keep)
            except FAILURES as error:
                problem = f"{type(error).__name__}: {error}"
        (problem,) = broadcast_object_list([problem], process=self.process)
        if problem is not None:
            raise CheckpointError(
                f"The new checkpoint is complete, but an old one could not be removed ({problem}), and with "
                f"`total_limit={limit}` the disk would fill up. Make `{folder}` writable, or leave the limit out."
            )
