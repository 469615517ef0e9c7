"""What a run is made of, what each part is called in a checkpoint, and how it is taken apart and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.engine import Engine
from accel.fitting import fit_model, fit_optimizer
from accel_parallel import checkpoint as files
from accel_parallel.naming import parameter_names
from accel_parallel.strategy import OptimizerState
from accel_state.errors import CheckpointError, ConfigError
from accel_state.process import Process
from accel_state.protocols import Stateful, StatefulLoader

__all__ = ["Contents"]


class Contents:
    """Models, optimizers, schedulers, loaders and registered objects of one `Accelerator`, as items of a checkpoint."""

    def __init__(self, engine: Engine, process: Process, loaders: Sequence[StatefulLoader[Any]]) -> None:
        """
        Args:
            engine: holds what is prepared.
            process: the open process.
            loaders: those that are prepared, as they become more.
        """
        self.engine = engine
        self.process = process
        self.loaders = loaders
        self.custom: list[Stateful] = []
        """What was registered, in that order."""

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

    def names(self) -> list[str]:
        """Of all items that this run saves for itself, random generators apart."""
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

    def items(self) -> list[files.Item]:
        """What this rank gives to a checkpoint. Every rank must call this."""
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

    def restore(self, states: dict[str, Any]) -> None:
        """Give each object its state, where there is one. Every rank must call this."""
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

    def fit(self, checkpoint: files.Checkpoint, states: dict[str, Any]) -> list[str]:
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

    def refuse_other_items(self, checkpoint: files.Checkpoint) -> None:
        """
        Raises:
            CheckpointError: if it holds other items than this run has, or states of other classes.
        """
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
        return sorted(set(self.names()) - saved), sorted(saved - set(self.names()))


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
