"""Saving and restoring everything that a run is made of, strictly and all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accel.engine import Engine
from accel.fitting import fit_model, fit_optimizer
from accel.project import ProjectConfiguration
from accel_parallel import checkpoint as files
from accel_parallel.checkpoint.location import Location, as_location
from accel_parallel.checkpoint.shelf import Shelf, recover_at, shelf_of
from accel_parallel.checkpoint.staging import FAILURES
from accel_parallel.naming import parameter_names
from accel_parallel.strategy import OptimizerState
from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import CheckpointError, ConfigError
from accel_state.logging import get_logger
from accel_state.process import Process
from accel_state.protocols import Stateful, StatefulLoader
from accel_state.rng import rng_state, set_rng_state

__all__ = ["Saving"]

logger = get_logger(__name__)

SaveHook = Callable[[list[Any], list[dict[str, Any]], str], None]
LoadHook = Callable[[list[Any], str], None]
_T = TypeVar("_T")


class Saving:
    """The checkpoints of one `Accelerator`."""

    def __init__(
        self, engine: Engine, process: Process, project: ProjectConfiguration, loaders: list[StatefulLoader[Any]]
    ) -> None:
        self.engine = engine
        self.process = process
        self.project = project
        self.loaders = loaders
        self.custom: list[Stateful] = []
        self.save_hooks: list[SaveHook] = []
        self.load_hooks: list[LoadHook] = []
        self._background: files.BackgroundSaver | None = None
        """Made, and its modules loaded, by the first save in the background."""
        self._resumed_from: Location | None = None
        self._num_named = 0
        """Automatically named checkpoints that this run has written."""

    def register(self, objects: tuple[Any, ...]) -> None:
        """Add objects to every later checkpoint, in this order.

        Raises:
            ConfigError: naming those without ``state_dict`` and ``load_state_dict``.
        """
        odd = [type(each).__name__ for each in objects if not isinstance(each, Stateful)]
        if odd:
            raise ConfigError(
                f"`register_for_checkpointing` was given {', '.join(odd)}, without `state_dict` and "
                "`load_state_dict`, so "
                f"there is nothing to save or restore. Give these classes both methods."
            )
        self.custom += objects

    def save(self, output_dir: str | Path | None, if_busy: str) -> Location:
        """Write a checkpoint. Every rank must call this. Returns its folder."""
        if if_busy != "wait":
            raise ConfigError(
                f"`if_busy={if_busy!r}` was given to a save that blocks, which is what was asked for and is written. "
                f"Add `blocking=False`, or leave it out."
            )
        self.settle()
        final = self._save_path(output_dir)
        files.save_checkpoint(final, self._contents(final), process=self.process, **self._about())
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
        pending = self._background.save(final, self._contents(final), prune=prune, **self._about())
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

    def _contents(self, final: Location) -> list[files.Item]:
        """Every rank must call this. What this rank gives to a checkpoint; where that fails on any, all raise."""
        return self._all_or_none(lambda: self._own_contents(final), "What is to be saved could not be put together")

    def _own_contents(self, final: Location) -> list[files.Item]:
        items = self._items()
        for hook in self.save_hooks:
            hook(list(self.engine.models), [item.state for item in items if item.kind == "model"], str(final))
        return [*items, files.Item(f"rng_{self.process.topology.rank}", "rng", rng_state(self.process.kind))]

    def _about(self) -> dict[str, Any]:
        strategy = self.engine.strategy
        return {
            "step": max((optimizer.steps_taken for optimizer in self.engine.optimizers), default=0),
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
        checkpoint = self._agree(lambda: self._proved(folder, strict=strict))
        states, generators, step = self._agree(lambda: self._read(checkpoint, strict=strict))
        waived = self._all_or_none(
            lambda: self._take(checkpoint, states, str(folder), strict=strict),
            "The checkpoint was read, and not all of it could be restored",
        )
        self.engine.restart()
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
            hook(list(self.engine.models), folder)
        waived = [] if strict else self._fit(checkpoint, states)
        self._restore(states)
        return waived

    def _fit(self, checkpoint: files.Checkpoint, states: dict[str, Any]) -> list[str]:
        """Make states such that a strict restore takes them. Every rank must call this. Returns what is waived."""
        engine = self.engine
        missing, extra = self._other_items(checkpoint)
        waived = [f"`{name}` is not in the checkpoint, and stays as it is" for name in missing]
        waived += [f"`{name}` of the checkpoint has nothing here to go to" for name in extra]
        for name, (theirs, ours) in self._other_classes(checkpoint).items():
            states.pop(name, None)
            waived.append(f"`{name}` is of a {theirs} in the checkpoint and a {ours} here, and stays as it is")
        if not any(record.kind == "rng" for record in checkpoint.items.values()):
            waived.append("random generators are not in the checkpoint, and go on as they are")
        for index, model in enumerate(engine.models):
            name = _numbered("model", index)
            if name in states:
                states[name], lines = fit_model(name, states[name], engine.strategy.model_state(model))
                waived += lines
        names = self._parameter_names()
        for index, optimizer in enumerate(engine.optimizers):
            name = _numbered("optimizer", index)
            if name in states:
                present = engine.strategy.optimizer_state(optimizer.optimizer, names)
                found, lines = fit_optimizer(name, _optimizer_state(states[name]), present)
                states[name] = {**states[name], **_content(found)}
                waived += lines
        return waived

    def _proved(self, folder: Location, *, strict: bool) -> files.Checkpoint:
        checkpoint = files.Checkpoint(folder)
        if strict:
            self._refuse_other_items(checkpoint)
        topology = self.process.topology
        checkpoint.verify(share=topology.rank, num_shares=topology.world_size)
        return checkpoint

    def _read(self, checkpoint: files.Checkpoint, *, strict: bool) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
        lazy = {name for name, record in checkpoint.items.items() if record.kind in ("model", "optimizer")}
        names = [name for name in self._names() if name in checkpoint.items]
        states = {name: checkpoint.read(name, lazy=name in lazy, verify=False) for name in names}
        return states, self._read_generators(checkpoint, strict=strict), checkpoint.manifest.step

    def _all_or_none(self, action: Callable[[], _T], what: str) -> _T:
        """Do it on every rank. Where that raises on one, which it does as it would, the others raise too.

        Every rank must call this: otherwise those without an error would go on into an exchange that the other never
        comes to.
        """
        done = False
        try:
            found = action()
            done = True
        finally:
            told = gather_object([(self.process.topology.rank, done)], process=self.process)
        failed = [rank for rank, did in told if not did]
        if failed:
            raise CheckpointError(f"{what} on rank(s) {failed}, whose output tells why. Correct that, then try again.")
        return found

    def _agree(self, read: Callable[[], _T]) -> _T:
        """Read on every rank; where that fails on any, all raise, so that none goes on alone with other weights."""
        outcome: list[_T] = []
        problem: str | None = None
        try:
            outcome.append(read())
        except CheckpointError as error:
            problem = str(error)
        except FAILURES as error:
            problem = (
                f"Rank {self.process.topology.rank} could not read the checkpoint ({error}), so nothing was restored. "
                f"Check that every process sees the folder, or load another checkpoint."
            )
        problems = [each for each in gather_object([problem], process=self.process) if each is not None]
        if problems:
            raise CheckpointError(problems[0])
        return outcome[0]

    def _names(self) -> list[str]:
        engine = self.engine
        names = [_numbered("model", index) for index in range(len(engine.models))]
        names += [_numbered("optimizer", index) for index in range(len(engine.optimizers))]
        names += [_numbered("scheduler", index) for index in range(len(engine.schedulers))]
        names += [_numbered("loader", index) for index in range(len(self.loaders))]
        names += [_numbered("custom", index) for index in range(len(self.custom))]
        return names + (["scaler"] if engine.scaler is not None else [])

    def _parameter_names(self) -> dict[Any, str]:
        engine = self.engine
        return parameter_names(
            [(_numbered("model", index), engine.strategy.unwrap(model)) for index, model in enumerate(engine.models)]
        )

    def _items(self) -> list[files.Item]:
        engine = self.engine
        items = [
            files.Item(_numbered("model", index), "model", engine.strategy.model_state(model), shared=True)
            for index, model in enumerate(engine.models)
        ]
        names = self._parameter_names()  # after the states, which give up what a forward gathered
        for index, optimizer in enumerate(engine.optimizers):
            state = engine.strategy.optimizer_state(optimizer.optimizer, names)
            content = {**_content(state), "steps_taken": optimizer.steps_taken}
            name = _numbered("optimizer", index)
            items.append(files.Item(name, "optimizer", content, shared=True, of=_class_of("optimizer", optimizer)))
        own = self._own_items()  # on every rank, for a state may be put together over ranks
        return items + own if self.process.topology.is_main else items

    def _own_items(self) -> list[files.Item]:
        """What the main process saves for all."""
        engine = self.engine
        found: list[tuple[str, Any, Any]] = [("scheduler", each, each.state_dict()) for each in engine.schedulers]
        # Gradients are not saved: the batches of an unfinished window have to be seen again.
        found += [("loader", each, each.state_dict(rewind=engine.rewind(each))) for each in self.loaders]
        found += [("custom", each, each.state_dict()) for each in self.custom]
        numbers: dict[str, int] = {}
        items = []
        for kind, each, state in found:
            name = _numbered(kind, numbers.get(kind, 0))
            items.append(files.Item(name, kind, state, of=_class_of(kind, each)))
            numbers[kind] = numbers.get(kind, 0) + 1
        if engine.scaler is not None:
            items.append(files.Item("scaler", "scaler", engine.scaler.state_dict()))
        return items

    def _restore(self, states: dict[str, Any]) -> None:
        """Give each object its state, where there is one."""
        engine = self.engine
        for index, model in enumerate(engine.models):
            if (state := states.get(_numbered("model", index))) is not None:
                engine.strategy.load_model_state(model, state)
        names = self._parameter_names()  # after the states, for which gathered copies are given up
        for index, optimizer in enumerate(engine.optimizers):
            if (state := states.get(_numbered("optimizer", index))) is not None:
                engine.strategy.load_optimizer_state(optimizer.optimizer, names, _optimizer_state(state))
                optimizer.steps_taken = state["steps_taken"]
        for index, scheduler in enumerate(engine.schedulers):
            if (state := states.get(_numbered("scheduler", index))) is not None:
                scheduler.load_state_dict(state)
                scheduler.settle()
        for kind, objects in (("loader", self.loaders), ("custom", self.custom)):
            for index, each in enumerate(objects):
                if (name := _numbered(kind, index)) in states:
                    each.load_state_dict(states[name])
        if engine.scaler is not None and "scaler" in states:
            engine.scaler.load_state_dict(states["scaler"])

    def _other_classes(self, checkpoint: files.Checkpoint) -> dict[str, tuple[str, str]]:
        """Items whose state is that of another class than what is here, and both."""
        engine = self.engine
        objects: list[tuple[str, Sequence[Any]]] = [("optimizer", engine.optimizers), ("scheduler", engine.schedulers)]
        found = {}
        for kind, each_of in [*objects, ("custom", self.custom)]:
            for index, each in enumerate(each_of):
                record = checkpoint.items.get(_numbered(kind, index))
                ours = _class_of(kind, each)
                if record is not None and record.of and ours and record.of != ours:
                    found[_numbered(kind, index)] = (record.of, ours)
        return found

    def _other_items(self, checkpoint: files.Checkpoint) -> tuple[list[str], list[str]]:
        """What it lacks, and what it holds besides."""
        saved = {name for name, record in checkpoint.items.items() if record.kind != "rng"}
        return sorted(set(self._names()) - saved), sorted(saved - set(self._names()))

    def _refuse_other_items(self, checkpoint: files.Checkpoint) -> None:
        other = self._other_classes(checkpoint)
        if other:
            said = "; ".join(f"`{name}` of a {theirs}, here a {ours}" for name, (theirs, ours) in other.items())
            raise CheckpointError(
                f"`{checkpoint.folder.location}` holds {said}, and the state of one means nothing to the other. Make "
                f"the same objects, in the same order, as when it was written, or waive them by `strict=False`."
            )
        missing, extra = self._other_items(checkpoint)
        if missing or extra:
            parts = [
                f"lacks {', '.join(missing)}" if missing else "",
                f"also holds {', '.join(extra)}" if extra else "",
            ]
            raise CheckpointError(
                f"`{checkpoint.folder.location}` {' and '.join(each for each in parts if each)}, so it does not fit "
                f"what is prepared and registered here, and restoring a part would be wrong. Prepare and register "
                f"the same objects, in the same order and precision, as when it was written."
            )

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
            return shelf.numbered(self._ask(shelf, shelf.next_number))
        if self._ask(shelf, lambda: shelf.holds(number)):
            raise ConfigError(
                f"`ProjectConfiguration(iteration={number})` names `{shelf.numbered(number)}`, which exists. "
                f"Leave `iteration` out to go on after the highest number, or remove that folder."
            )
        return shelf.numbered(number)

    def _ask(self, shelf: Shelf, question: Callable[[], _T]) -> _T:
        """The answer of the main process. Every rank must call this; where that fails, all raise."""
        outcome: list[tuple[list[_T], str]] = [([], "")]
        if self.process.topology.is_main:
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
        answer, problem = broadcast_object_list(outcome, process=self.process)[0]
        if not answer:
            raise CheckpointError(problem)
        return answer[0]

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
        latest = self._ask(shelf, shelf.latest)
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


def _numbered(kind: str, index: int) -> str:
    return kind if index == 0 else f"{kind}_{index}"


def _content(state: OptimizerState) -> dict[str, Any]:
    """A state as an item holds it."""
    content = {"state": state.state, "groups": state.groups}
    return {**content, "engine": state.engine} if state.engine else content


def _optimizer_state(content: Mapping[str, Any]) -> OptimizerState:
    """The same from an item. Strategies read tensors of parameters part by part; those in lists and groups are read."""
    state = {
        name: {key: each if isinstance(each, files.StoredTensor) else _in_memory(each) for key, each in entries.items()}
        for name, entries in content["state"].items()
    }
    return OptimizerState(state=state, groups=_in_memory(content["groups"]), engine=content.get("engine", {}))


def _in_memory(value: Any) -> Any:
    """The same with every tensor that is in a file in memory."""
    if isinstance(value, files.StoredTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: _in_memory(each) for key, each in value.items()}
    return type(value)(_in_memory(each) for each in value) if isinstance(value, (list, tuple)) else value


def _class_of(kind: str, each: Any) -> str:
    """The class that alone takes such a state; empty where others may, such as an engine's optimizer for torch's."""
    if kind == "custom":
        return type(each).__qualname__
    inner = getattr(each, kind, each)
    return type(inner).__qualname__ if type(inner).__module__.startswith("torch.optim") else ""
