"""The members of `Accelerator` that speak of checkpoints and weights in files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn

from accel.engine import Engine, refuse_inside, refuse_saving
from accel.exporting import names_of_ties, on_main, save_weights, size_in_bytes
from accel.process_view import ProcessView
from accel.saving import LoadHook, SaveHook, Saving
from accel.stopping import StopSignals
from accel_parallel.checkpoint.location import Location
from accel_parallel.checkpoint.pending import PendingSave
from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["CheckpointView"]


class CheckpointView(ProcessView):
    """Saving and restoring a run. Base of `Accelerator`."""

    _engine: Engine
    _saving: Saving
    _stop_signals: StopSignals | None = None

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and restore these too; each has ``state_dict`` and ``load_state_dict``.

        The main process's state is saved, and restored on every rank: keep these objects alike on all.
        """
        self._saving.contents.register(objects)

    def register_save_state_pre_hook(self, hook: SaveHook) -> None:
        """Call ``hook(models, weights, folder)`` before each save; it may change the weights in place.

        Weights that are divided over processes are given as this process holds them, such as a ``DTensor``.
        """
        self._saving.save_hooks.append(hook)

    def register_load_state_pre_hook(self, hook: LoadHook) -> None:
        """Call ``hook(models, folder)`` before each restore."""
        self._saving.load_hooks.append(hook)

    @overload
    def save_state(self, output_dir: str | Path | None = None, *, blocking: Literal[True] = True) -> Location: ...
    @overload
    def save_state(
        self, output_dir: str | Path | None = None, *, blocking: Literal[False], if_busy: str = "wait"
    ) -> PendingSave: ...
    def save_state(
        self, output_dir: str | Path | None = None, *, blocking: bool = True, if_busy: str = "wait"
    ) -> Location | PendingSave:
        """Write a checkpoint of all that is prepared and registered. Every rank must call this.

        It appears complete or not at all, whatever happens meanwhile. Inside an unfinished accumulation window, the
        loader's place is saved as of the window's start, for gradients are not saved.

        Args:
            output_dir: folder; by default the next ``<project_dir>/checkpoints/checkpoint_<n>``.
            blocking: ``False`` returns once all is copied to host memory. A process of its own writes it and commits;
                what it fails with is raised by ``wait()`` of what is returned, the next save or load, `end_training`.
            if_busy: where an earlier save is still going on, ``"wait"`` for it, or ``"skip"`` this one and return that.

        Raises:
            CheckpointError: on every rank, if it could not be written; earlier checkpoints are untouched.
        """
        self._together("save_state")
        refuse_saving(self._engine)
        return self._saving.save(output_dir, if_busy) if blocking else self._saving.begin_save(output_dir, if_busy)

    def load_state(self, input_dir: str | Path | None = None, *, strict: bool = True) -> Location | None:
        """Restore everything from a checkpoint, strictly. Every rank must call this, after `prepare`.

        Args:
            input_dir: folder; by default the latest complete checkpoint of the project.
            strict: ``False`` restores what fits by name, shape and dtype, and logs a warning that names every item,
                tensor and optimizer state that was waived. Damaged files are refused all the same.

        Returns:
            The folder restored from, or ``None`` where none was asked for and nothing was saved yet.

        Raises:
            CheckpointError: naming what is missing, extra, damaged or of another shape; nothing is changed then,
                unless the mismatch shows only when an object takes its state.
        """
        self._together("load_state")
        return self._saving.load(input_dir, strict=strict)

    def save_model(self, model: nn.Module, save_directory: str | Path, max_shard_size: int | str = "10GB") -> None:
        """Write a model's weights as safetensors that ``from_pretrained``-like readers take. Every rank must call this.

        Args:
            model: what `prepare` returned. A sharded one is gathered tensor by tensor on the main process.
            save_directory: folder, made if missing. Weights that lie there already are replaced.
            max_shard_size: of one file, in bytes or such as ``"5GB"``; more is written as several with an index.

        Raises:
            CheckpointError: on every rank, if it could not be written.
        """
        limit, folder = size_in_bytes(max_shard_size), Path(save_directory)
        strategy = self._engine.strategy
        state, ties = strategy.full_state(model, everywhere=False), names_of_ties(strategy.unwrap(model))
        write = partial(save_weights, state, folder, max_shard_size=limit, ties=ties)
        on_main(write, process=self.process, what=f"`{folder}`")

    def catch_stop_signals(self, *signals: int) -> None:
        """Let a scheduler that takes the machine back ask this run to end, instead of ending it.

        From now on such a signal only makes `stop_requested` true, once it reached any process; a second one ends the
        process as before. Until the process closes. Main thread only.

        Args:
            signals: by default ``SIGTERM``, and ``SIGUSR1``, which SLURM's ``--signal=USR1@120`` sends in advance.

        Raises:
            ConfigError: for a number that cannot be caught, or where this is no main thread.
        """
        self._stop_signals = StopSignals(signals, replacing=self._stop_signals)

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop: save and leave the loop then. Every rank must call this.

        ::

            accelerator.catch_stop_signals()
            for batch in loader:
                ...
                if accelerator.stop_requested():
                    accelerator.save_state()
                    break

        Raises:
            ConfigError: without `catch_stop_signals`.
        """
        if self._stop_signals is None:
            raise ConfigError(
                "`stop_requested()` was called, and no signal is caught that could ask for it. Call "
                "`catch_stop_signals()` once, after the Accelerator was made."
            )
        return self._stop_signals.any_caught(self._together("stop_requested"))

    def _release_signals(self) -> None:
        if self._stop_signals is not None:
            self._stop_signals.release()
            self._stop_signals = None

    def _together(self, what: str) -> Process:
        refuse_inside(self._engine, what)
        return self.process
