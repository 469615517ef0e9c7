"""What a DeepSpeed engine holds of a model and its optimizer, by name and parameter by parameter, to read and to write.

DeepSpeed's own files are pickles, which this project neither writes nor reads. Weights in float32 count as the model,
where the parameters themselves are 16 bits wide: from those the others follow, and not the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accel_parallel.deepspeed.tensor import TensorDivision
from accel_parallel.extra_state import give_extra_states, is_extra
from accel_parallel.flat import FlatPart
from accel_parallel.sharded import in_memory, range_of, whole
from accel_state.errors import CheckpointError

__all__ = ["EngineStates"]

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where this rank keeps its range of the float32 weights of one parameter."""

    flat: torch.Tensor
    """What the optimizer steps on; the parameter's range is a part of it."""
    offset: int
    """Of the range in `flat`."""
    start: int
    """Of the range in the parameter."""
    numel: int


class EngineStates:
    """Reads and writes the state of one engine."""

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        groups: Sequence[Sequence[torch.Tensor]],
        *,
        stage: int,
        division: TensorDivision,
    ) -> None:
        """
        Args:
            engine: what ``deepspeed.initialize`` gave.
            model: the one that was given to it.
            groups: parameters of the optimizer's groups, as they were before; none without an optimizer.
            stage: of ZeRO.
            division: of the model along tp.
        """
        self.engine = engine
        self.division = division
        self.model = model
        self.groups = groups
        self.stage = stage
        self._optimizer = engine.optimizer
        self._trained = [parameter for group in groups for parameter in group]
        self._index = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group)}

    # The model

    def model_state(self) -> dict[str, torch.Tensor | FlatPart]:
        """Weights as they are saved, and persistent buffers: this rank's ranges of what is divided."""
        self._refuse_parts()
        return {name: self._weights(tensor) for name, tensor in self._named()}

    def full_state(self, *, everywhere: bool) -> dict[str, torch.Tensor]:
        """Weights in the model's own dtypes, gathered where they are divided.

        Args:
            everywhere: otherwise one after the other on the host of the main process, and nothing on the others.
        """
        if self.stage < 3:
            return {name: self.division.gather(tensor, tensor.detach()) for name, tensor in self._named()}
        keeps = everywhere or dist.get_rank() == 0
        found: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor | None] = {}  # tied ones are gathered once, on every rank
        for name, tensor in self._named():
            if id(tensor) not in copies:
                with _gathered(tensor):
                    full = self.division.gather(tensor, tensor.detach())
                    copies[id(tensor)] = None
                    if keeps:
                        copies[id(tensor)] = full.clone() if everywhere else full.to("cpu", copy=True)
            copied = copies[id(tensor)]
            if copied is not None:
                found[name] = copied
        return found

    def load_model_state(self, state: Mapping[str, Any]) -> None:
        """Copy a state in that was checked against `model_state` before. Every rank must call this."""
        done: set[int] = set()
        for name, tensor in self._named():
            if id(tensor) not in done and not is_extra(name):
                done.add(id(tensor))
                self._load_weights(tensor, state[name])
        give_extra_states(self.model, state)

    # The optimizer

    def optimizer_state(self, names: Mapping[torch.Tensor, str]) -> dict[str, dict[str, Any]]:
        """Entries of each parameter: this rank's ranges of tensors as large as it, and numbers as they are."""
        self._refuse_parts()
        found: dict[str, dict[str, Any]] = {}
        for parameter in self._trained:
            place = self._place(parameter)
            held = self._basic.state.get(place.flat, {})
            if held:
                found[names[parameter]] = {key: self._entry(parameter, place, key) for key in held}
        return found

    def load_optimizer_state(self, names: Mapping[torch.Tensor, str], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy a state in whose names and shapes were checked before. Every rank must call this."""
        entries: dict[int, dict[str, Any]] = {}
        flats: dict[int, torch.Tensor] = {}
        for parameter in self._trained:
            flat = self._place(parameter).flat
            flats[id(flat)] = flat
            entries.setdefault(id(flat), {}).update(state.get(names[parameter], {}))
        for key, flat in flats.items():
            self._allot(flat, entries[key])
        for parameter in self._trained:
            place = self._place(parameter)
            saved = state.get(names[parameter], {})
            for key, held in self._basic.state.get(place.flat, {}).items():
                if _is_range(held, place.flat):
                    value = range_of(saved[key], place.start, place.numel) if key in saved else None
                    self._write(parameter, place, value, key)

    def engine_state(self) -> dict[str, Any]:
        """The loss scale and what adapts it, under float16."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        if scaler is None or not getattr(scaler, "dynamic", False):
            return {}
        return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        """Put it back; nothing where there was none."""
        for name, value in state.items():
            setattr(self._optimizer.loss_scaler, name, value)

    def described(self, parameter: torch.Tensor) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of a trained parameter, as it is saved."""
        return list(_shape_of(parameter)), self._place(parameter).flat.dtype

    def _refuse_parts(self) -> None:
        if self.division:
            raise CheckpointError(
                "A checkpoint was to be written or read of a model that AutoTP divides, and this version puts only its "
                "weights together. Save these with `save_model` or `get_state_dict`, or train without AutoTP."
            )

    @property
    def _basic(self) -> Any:
        return self.engine.basic_optimizer

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.model.state_dict(keep_vars=True).items())

    def _weights(self, tensor: torch.Tensor) -> torch.Tensor | FlatPart:
        if id(tensor) in self._index:
            place = self._place(tensor)
            if self.stage == 0:
                return place.flat.detach()
            return FlatPart(_shape_of(tensor), place.start, self._read(tensor, place, None), self._group)
        if not hasattr(tensor, "ds_tensor"):
            return tensor.detach()
        start, numel = _own_range(tensor)
        return FlatPart(_shape_of(tensor), start, tensor.ds_tensor.detach().view(-1)[:numel], self._group)

    def _load_weights(self, tensor: torch.Tensor, value: Any) -> None:
        if id(tensor) in self._index and (self.stage > 0 or self._place(tensor).flat is not tensor):
            place = self._place(tensor)
            self._write(tensor, place, range_of(value, place.start, place.numel), None)
        full = whole(value) if isinstance(value, FlatPart) else in_memory(value)
        with torch.no_grad(), _gathered(tensor, modified=True) if hasattr(tensor, "ds_tensor") else nullcontext():
            if not hasattr(tensor, "ds_tensor") or dist.get_rank() == 0:
                tensor.copy_(full)

    @property
    def _group(self) -> Any:
        return self.engine.seq_data_parallel_group

    def _place(self, parameter: torch.Tensor) -> _Place:
        group, position = self._index[id(parameter)]
        if self.stage == 0:
            masters = getattr(self._optimizer, "fp32_groups", None)
            flat = parameter if masters is None else masters[group][position]
            return _Place(flat, 0, 0, flat.numel())
        if self.stage == 3:
            optimizer = self._optimizer
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            return _Place(optimizer.fp32_partitioned_groups_flat[group], offset, *_own_range(parameter))
        flat = self._optimizer.single_partition_of_fp32_groups[group]
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # other ranks have all of it
            return _Place(flat, 0, 0, 0)
        inside, own = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return _Place(flat, inside.start, own.start, own.numel)

    def _entry(self, parameter: torch.Tensor, place: _Place, key: str) -> Any:
        held = self._basic.state[place.flat][key]
        if not isinstance(held, torch.Tensor):
            return held
        if held.numel() == 1 != place.flat.numel():
            return held.clone()  # one count for all that lies in `flat`, and one of its own for each where it is read
        if not _is_range(held, place.flat):
            raise CheckpointError(
                f"The optimizer {type(self._basic).__name__} keeps `{key}` in shape {tuple(held.shape)} for several "
                f"parameters together, so it cannot be saved for each of them. Use one that keeps a number for each "
                f"element, such as AdamW, or ZeRO stage 0."
            )
        if self.stage == 0:
            return held.detach()
        return FlatPart(_shape_of(parameter), place.start, self._read(parameter, place, key), self._group)

    def _read(self, parameter: torch.Tensor, place: _Place, key: str | None) -> torch.Tensor:
        if self.stage == 3:  # which may have to fetch it from a disk
            held: torch.Tensor = self._optimizer.get_local_fp32_param(parameter, key)
            return held.detach().view(-1)[: place.numel]
        held = place.flat if key is None else self._basic.state[place.flat][key]
        return held.detach().view(-1).narrow(0, place.offset, place.numel)

    def _write(self, parameter: torch.Tensor, place: _Place, value: torch.Tensor | None, key: str | None) -> None:
        """Zeros for ``None``, which is what an optimizer begins with."""
        if self.stage == 3:
            padded = self._optimizer.get_local_fp32_param(parameter, key).detach().clone().zero_()
            if value is not None:
                padded.view(-1)[: place.numel].copy_(value)
            self._optimizer.set_local_hp_param(padded, parameter, key)
            return
        target = self._read(parameter, place, key)
        if value is None:
            target.zero_()
        else:
            target.copy_(value)

    def _allot(self, flat: torch.Tensor, entries: Mapping[str, Any]) -> None:
        """Give the optimizer the entries that its state is to have for a tensor that it steps on."""
        if not entries:
            self._basic.state.pop(flat, None)
            return
        held = self._basic.state[flat]
        for key in [key for key in held if key not in entries]:
            del held[key]
        for key, value in entries.items():
            if not isinstance(value, torch.Tensor) and not hasattr(value, "shape"):
                held[key] = value
            elif torch.Size(value.shape).numel() == 1 and not (key in held and _is_range(held[key], flat)):
                held[key] = in_memory(value).clone()
            elif key not in held:
                held[key] = torch.zeros_like(flat, requires_grad=False)
        if hasattr(self._optimizer, "_hp_optimizer_states_linked"):
            self._optimizer._hp_optimizer_states_linked = False  # looked up anew in the next step


def _is_range(held: object, flat: torch.Tensor) -> bool:
    return isinstance(held, torch.Tensor) and held.shape == flat.shape and held.dim() > 0


def _shape_of(tensor: torch.Tensor) -> torch.Size:
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def _own_range(parameter: Any) -> tuple[int, int]:
    """Where this rank's part of a parameter of stage 3 begins, and its elements that are no padding."""
    part = parameter.partition_numel()
    rank = dist.get_rank(parameter.ds_process_group)
    start = min(rank * part, parameter.ds_numel)
    return start, min(part, parameter.ds_numel - start)


def _gathered(tensor: torch.Tensor, *, modified: bool = False) -> Any:
    """While open, all of a parameter of stage 3 is there, to be changed by the main process."""
    if not hasattr(tensor, "ds_tensor"):
        return nullcontext()
    from deepspeed import zero  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return zero.GatheredParameters([tensor], modifier_rank=0 if modified else None)
