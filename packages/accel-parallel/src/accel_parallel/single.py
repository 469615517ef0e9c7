"""One process, one device, nothing spread: the strategy that the others are measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from accel_parallel.audit import is_spread
from accel_parallel.clip import check_clip, gradients_of, scale_gradients_
from accel_parallel.extra_state import is_extra
from accel_parallel.room import fits, room_in
from accel_parallel.sharded import in_memory, local_of, part_of, read_all, to_copy
from accel_parallel.strategy import Bundle, Duty, OptimizerState
from accel_state.errors import CheckpointError, ConfigError
from accel_state.process import DistributedType, Process
from accel_state.protocols import LossScaler
from accel_state.topology import Axis

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from accel_parallel.compilation import TorchDynamoPlugin
    from accel_parallel.parallelism import ParallelismConfig
    from accel_parallel.sequence.attention import SequenceParallel

__all__ = ["SingleStrategy", "check_optimizer_state"]


class SingleStrategy:
    """Models move to the process's device and are otherwise left as they are."""

    name = "single"
    owns: frozenset[Duty] = frozenset()
    options_type: type | None = None

    axes: frozenset[Axis] = frozenset()
    exchanges_each_batch = False
    distributed_type: DistributedType | None = None
    sequence: SequenceParallel | None = None
    device_mesh: DeviceMesh | None = None
    reduce_found_inf: Callable[[torch.Tensor], None] | None = None

    def __init__(
        self,
        process: Process,
        *,
        place: bool = True,
        options: None = None,
        parallelism: ParallelismConfig | None = None,
        dynamo: TorchDynamoPlugin | None = None,
    ) -> None:
        """
        Args:
            process: the open process, whose device is used.
            place: whether to move models to the device; without it they must be there already.
            options: this strategy has none.
            parallelism: what was asked for besides the sizes of the mesh, which the process's topology has.
            dynamo: compile models with these settings, before they are wrapped.
        """
        self.process = process
        self.place = place
        self.parallelism = parallelism
        self.dynamo = dynamo

    @classmethod
    def settings_in(cls, given: Any) -> dict[str, tuple[Any, str]]:
        """Settings of the run that options for this strategy say too, with where they say it.

        Args:
            given: as the user gave them; ``None`` where nothing was.

        Returns:
            Any of ``mixed_precision`` and ``gradient_accumulation_steps``.
        """
        return {}

    @classmethod
    def settle_options(
        cls, given: Any, *, process: Process, parallelism: ParallelismConfig | None, precision: str
    ) -> Any:
        """What a run makes of the options that it was given for this strategy.

        Args:
            given: as the user gave them; ``None`` where nothing was.
            process: the open process.
            parallelism: as the user gave it.
            precision: that the run computes in.

        Raises:
            ConfigError: for options that contradict it.
        """
        return given

    @property
    def average_size(self) -> int:
        return 1

    @property
    def fills_meta(self) -> bool:
        return False

    @property
    def state_layout(self) -> str:
        return "full"

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def trained_parameters(self, optimizer: Optimizer) -> list[torch.Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def prepare(self, bundle: Bundle) -> Bundle:
        if self.place:
            for model in bundle.models:
                if not is_spread(model):
                    model.to(self.process.device)
            for optimizer in bundle.optimizers:
                if optimizer.state:  # it stepped before: let its state follow its parameters
                    optimizer.load_state_dict(optimizer.state_dict())
        for model in bundle.models:
            self.compile(model)
        return bundle

    def compile(self, model: nn.Module, *, sharded: bool = False) -> None:
        """Compile `model` in place if the run asks for it; the last thing before it is wrapped.

        Args:
            model: what to compile.
            sharded: whether its blocks will be sharded one by one, whose hooks would cut the graph of the whole.
        """
        if self.dynamo is not None:
            from accel_parallel.compilation import compile_model  # dynamo takes long to import

            compile_model(model, self.dynamo, sharded=sharded)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)  # type: ignore[no-untyped-call, unused-ignore]

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def sync_in_backward(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def join(
        self, models: Sequence[nn.Module], *, settle: Callable[[int], None] | None = None
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        check_clip(max_norm, norm_type)
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def grad_norm(self, parameters: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
        return nn.utils.get_total_norm(gradients_of(parameters), norm_type)

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        nn.utils.clip_grad_value_(parameters, clip_value)

    def scale_gradients_(self, parameters: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
        scale_gradients_(gradients_of(parameters), factor)

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        optimizer.zero_grad(set_to_none)

    def step(self, optimizer: Optimizer, *, scaler: LossScaler, closure: Callable[[], Any] | None = None) -> bool:
        if not scaler.enabled:
            optimizer.step(closure)
            return True
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scaler.unscale_(optimizer, gradients_of(parameters))
        return scaler.step(optimizer, optimizer.step)

    def model_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.unwrap(model).state_dict().items() if _is_tensor(name, value)}

    def load_model_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        inner = self.unwrap(model)
        self.check_model_state(self.model_state(inner), state)
        # A module may keep what it is given as its extra state, which must not be the memory of a file.
        values = {name: in_memory(value) if is_extra(name) else to_copy(value) for name, value in state.items()}
        inner.load_state_dict(values, strict=True)

    @staticmethod
    def check_model_state(present: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Refuse a saved state that does not fit the one of the model, naming what differs.

        Raises:
            CheckpointError: for another name, shape or dtype.
        """
        _refuse_other_names("the model", set(present), set(state))
        for name, tensor in state.items():
            if tensor.shape != present[name].shape:
                raise CheckpointError(
                    f"`{name}` has shape {tuple(tensor.shape)} in the checkpoint and {tuple(present[name].shape)} in "
                    "the "
                    f"model, so it cannot be copied. Build the model as it was when the checkpoint was written."
                )
            if tensor.dtype != present[name].dtype:
                raise CheckpointError(
                    f"`{name}` is {tensor.dtype} in the checkpoint and {present[name].dtype} in the model; copying "
                    "would "
                    f"round it without a word. Build the model in {tensor.dtype}."
                )

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> OptimizerState:
        groups = [
            {
                **group,
                "params": [names[parameter] for parameter in group["params"]],
                "param_shapes": [list(parameter.shape) for parameter in group["params"]],
                "param_dtypes": [parameter.dtype for parameter in group["params"]],
            }
            for group in optimizer.param_groups
        ]
        state = {names[parameter]: dict(entries) for parameter, entries in optimizer.state.items()}
        return OptimizerState(state=state, groups=groups)

    def load_optimizer_state(
        self, optimizer: Optimizer, names: Mapping[torch.Tensor, str], state: OptimizerState
    ) -> None:
        ours = [
            {names[parameter]: (list(parameter.shape), parameter.dtype) for parameter in group["params"]}
            for group in optimizer.param_groups
        ]
        check_optimizer_state(ours, state)
        # torch wants positions: number the parameters of this optimizer and place each entry by its name.
        position = {name: number for number, name in enumerate(name for group in ours for name in group)}
        offset, groups = 0, []
        for present, saved in zip(optimizer.param_groups, state.groups, strict=True):
            count = len(present["params"])
            settings = {key: value for key, value in saved.items() if key not in ("param_shapes", "param_dtypes")}
            groups.append({**settings, "params": list(range(offset, offset + count))})
            offset += count
        places = [(name, key) for name, entries in state.state.items() for key in entries]
        found = [state.state[name][key] for name, key in places]
        parameters = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
        room = room_in(optimizer, names)
        rooms = [
            room[place] if place in room and fits(value, room[place]) else None
            for place, value in zip(places, found, strict=True)
        ]
        room.clear()
        optimizer.state.clear()  # its other memory is for what comes
        self._settle_device()  # what was queued before may still read it, on another stream than the readers'
        values = read_all(self._own_entry, found, [parameters.get(name) for name, _ in places], rooms)
        self._settle_device()
        held: dict[str, dict[str, Any]] = {name: {} for name in state.state}
        for (name, key), value in zip(places, values, strict=True):
            held[name][key] = value
        optimizer.load_state_dict(
            {"state": {position[name]: entries for name, entries in held.items()}, "param_groups": groups}
        )
        _restore_dtypes(optimizer, names, held)

    def _settle_device(self) -> None:
        if self.process.device.type != "cpu":
            torch.accelerator.synchronize(self.process.device)

    def _own_entry(self, value: Any, parameter: torch.Tensor | None, room: torch.Tensor | None) -> Any:
        """An entry of an optimizer's state as this rank holds it, in `room` where there is any."""
        if room is None:
            return self._new_entry(value, parameter)
        with torch.no_grad():
            local_of(room).copy_(part_of(value, room))
        return room

    def _new_entry(self, value: Any, parameter: torch.Tensor | None) -> Any:
        """The same where the parameter is, so that the host never holds all of them."""
        found = in_memory(value)
        if parameter is None or not isinstance(found, torch.Tensor) or not found.dim():
            return found
        return found.to(parameter.device) if found.shape == parameter.shape else found

    def full_state(self, model: nn.Module, *, everywhere: bool = True) -> dict[str, torch.Tensor]:
        return self.model_state(model)

    def unwrap(self, model: nn.Module) -> nn.Module:
        inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        assert isinstance(inner, nn.Module)
        return inner

    def scheduler_for(self, scheduler: Any, optimizer: Optimizer) -> Any:
        if getattr(scheduler, "is_placeholder", False):
            raise ConfigError(
                f"A {type(scheduler).__name__} was given to `prepare`. It stands for the scheduler of a configuration "
                f"of DeepSpeed, and the strategy `{self.name}` has none. Give the scheduler itself."
            )
        return scheduler

    def explain(self) -> list[str]:
        return []

    def release(self) -> None: ...


def _is_tensor(name: str, value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    raise CheckpointError(
        f"`{name}` in the model's state is a {type(value).__name__}, and a checkpoint holds tensors there. "
        f"Return a tensor from `get_extra_state`, or register the object with `register_for_checkpointing`."
    )


def check_optimizer_state(
    present: Sequence[Mapping[str, tuple[list[int], torch.dtype]]], state: OptimizerState
) -> None:
    """Refuse a saved state that does not fit an optimizer, naming what differs.

    Args:
        present: for each group of the optimizer, shape and dtype of its parameters by name.
        state: the saved one.

    Raises:
        CheckpointError: for other groups, names, shapes or dtypes.
    """
    if len(state.groups) != len(present):
        raise CheckpointError(
            f"The checkpoint's optimizer has {len(state.groups)} parameter groups and this one has "
            f"{len(present)}. Build the optimizer as it was when the checkpoint was written."
        )
    for ours, saved in zip(present, state.groups, strict=True):
        _refuse_other_names("a parameter group of the optimizer", set(ours), set(saved["params"]))
        _refuse_other_parameters(ours, saved)
    known = {name for ours in present for name in ours}
    _refuse_other_names("the optimizer", known, set(state.state) | known)


def _refuse_other_parameters(present: Mapping[str, tuple[list[int], torch.dtype]], saved: Mapping[str, Any]) -> None:
    for name, shape, dtype in zip(saved["params"], saved["param_shapes"], saved["param_dtypes"], strict=True):
        our_shape, our_dtype = present[name]
        if our_shape != list(shape) or our_dtype != dtype:
            raise CheckpointError(
                f"The optimizer's state of `{name}` belongs to a parameter of shape {tuple(shape)} and {dtype}, and "
                f"here it has shape {tuple(our_shape)} and {our_dtype}. Build the model as it was when the "
                f"checkpoint was written."
            )


def _restore_dtypes(
    optimizer: Optimizer, names: Mapping[torch.Tensor, str], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """torch's `load_state_dict` rounds entries to the dtype of their parameter; take those that it changed anew."""
    for parameter, entries in optimizer.state.items():
        for key, value in state[names[parameter]].items():
            present = entries.get(key)
            if isinstance(present, torch.Tensor) and isinstance(value, torch.Tensor) and present.dtype != value.dtype:
                entries[key] = value.to(present.device, copy=True)


def _refuse_other_names(what: str, present: set[str], saved: set[str]) -> None:
    missing, extra = sorted(present - saved), sorted(saved - present)
    if missing or extra:
        parts = [f"lacks {_some(missing)}" if missing else "", f"holds {_some(extra)} too" if extra else ""]
        raise CheckpointError(
            f"The checkpoint of {what} {' and '.join(part for part in parts if part)}. Restoring only a part would "
            f"go on with wrong values. Build it as it was when the checkpoint was written."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
