"""What loading a checkpoint into a model comes to, worked out before any value is read or memory is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from accel_bigmodel.loading.box import Box
from accel_bigmodel.loading.delivery import Delivery, ReadSettings, whole_of
from accel_bigmodel.loading.extra import PlannedExtra, extra_states
from accel_bigmodel.loading.fused import Part
from accel_bigmodel.loading.match import Match, match
from accel_bigmodel.loading.memory import check_plain
from accel_bigmodel.loading.model_tensor import ModelTensor, is_sharded, model_tensors
from accel_bigmodel.loading.place import DISK, DeviceMap, DTypeRule, Place, places_of
from accel_bigmodel.loading.source import Source
from accel_bigmodel.stored import StoredTensor, map_tensor
from accel_state.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["LoadOptions", "LoadPlan", "PlannedTensor", "plan_load"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How a checkpoint is loaded; see `load_checkpoint_in_model`."""

    device_map: DeviceMap | int | str | torch.device | None = None
    """Where each module or tensor goes."""
    offload_folder: Path | None = None
    """Where tensors are written that stay on disk, but not as they are stored."""
    dtype: torch.dtype | str | None = None
    """Of floating-point tensors."""
    offload_buffers: bool = False
    """Whether buffers of modules on disk stay there too."""
    keep_in_fp32_modules: Collection[str] | None = None
    """Parts of names that stay in float32."""
    strict: bool = True
    """Whether both sides must have the same names."""
    mmap: bool = False
    """Whether files become the memory of what goes to the CPU as it is stored."""
    progress: bool | None = None
    """Whether a bar is shown; ``None``: where it takes long."""
    reading: ReadSettings = field(default_factory=ReadSettings)
    """How files are read."""


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """A tensor of the model that is loaded."""

    of: ModelTensor
    parts: tuple[tuple[Source, Part], ...]
    place: Place
    dtype: torch.dtype

    @property
    def stored(self) -> StoredTensor | None:
        """What is stored, if it is just this tensor, and readable in place."""
        source, part = self.parts[0]
        if len(self.parts) > 1 or part.place or not isinstance(source, StoredTensor) or source.dtype != self.dtype:
            return None
        return source

    @property
    def stays(self) -> bool:
        """Whether the model's tensor has the memory already that is to be filled."""
        tensor = self.of.tensor
        return tensor.device == self.place and (tensor.dtype == self.dtype or is_sharded(tensor))

    def mapped(self) -> torch.Tensor | None:
        """The tensor with its file as memory, if it is to be on the CPU as it is stored and has no memory yet."""
        source, part = self.parts[0]
        if self.place != torch.device("cpu") or self.stays or len(self.parts) > 1 or part.place:
            return None
        if source.dtype != self.dtype:
            return None
        return map_tensor(source) if isinstance(source, StoredTensor) else source.tensor

    def deliveries(self, memory: torch.Tensor) -> Iterable[Delivery]:
        """What fills `memory`, which is its own or is to become so."""
        memory = memory.detach()
        if is_sharded(memory):
            box = _local_box(self.of.name, memory)
            if all(begin < end for begin, end in box):
                yield Delivery(self.parts[0][0], box, memory.to_local())
            return
        for source, part in self.parts:
            yield whole_of(source, memory[part.place] if part.place else memory)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """Everything that is loaded, and what is not."""

    tensors: Sequence[PlannedTensor]
    extra: Sequence[PlannedExtra]
    match: Match

    @property
    def sources(self) -> list[Source]:
        """All that is read."""
        return [source for each in self.tensors for source, _ in each.parts] + [each.source for each in self.extra]

    @property
    def in_memory(self) -> list[PlannedTensor]:
        """Those that go to a device."""
        return [each for each in self.tensors if each.place != DISK]

    @property
    def on_disk(self) -> list[PlannedTensor]:
        """Those that stay in files."""
        return [each for each in self.tensors if each.place == DISK]


def plan_load(model: nn.Module, sources: Mapping[str, Source], options: LoadOptions, path: Path) -> LoadPlan:
    """Bring both sides together and check all that can be checked without reading values.

    Raises:
        ConfigError: if the options do not fit the model.
        CheckpointError: if the checkpoint does not.
    """
    tensors = model_tensors(model)
    places = places_of(model, tensors, options.device_map)
    rule = DTypeRule(tensors, options.dtype, options.keep_in_fp32_modules)
    extra = extra_states(model)
    matched = match(model, tensors, extra, sources, strict=options.strict, path=path)
    planned = []
    for each in tensors:
        if each.name in matched.parts:
            check_plain(each)
            parts = tuple((sources[part.source], part) for part in matched.parts[each.name])
            place = places[each.name]
            if place == DISK and not each.is_parameter and not options.offload_buffers:
                place = torch.device("cpu")
            dtype = rule.of(each, [source.dtype for source, _ in parts])
            planned.append(_checked(PlannedTensor(each, parts, place, dtype), options))
    _check_folder(planned, options)
    taken = [PlannedExtra(each, sources[matched.extra[each.name]]) for each in extra if each.name in matched.extra]
    return LoadPlan(tensors=planned, extra=taken, match=matched)


def _checked(planned: PlannedTensor, options: LoadOptions) -> PlannedTensor:
    tensor = planned.of.tensor
    if not is_sharded(tensor):
        return planned
    if planned.place == DISK or not planned.stays:
        raise ConfigError(
            f"`{planned.of.name}` is sharded over {tensor.device_mesh} and `device_map` moves it to "
            f"{str(planned.place)!r}, but its parts belong where they are. Leave the map out."
        )
    if tensor.dtype != planned.dtype:
        raise ConfigError(
            f"`{planned.of.name}` is sharded in {tensor.dtype} and `dtype={options.dtype}` asks for another, which "
            f"would take its memory from the sharding. Convert the model before it is sharded."
        )
    if len(planned.parts) > 1 or planned.parts[0][1].place:
        raise CheckpointError(
            f"`{planned.of.name}` is sharded, and stored in {len(planned.parts)} parts that are put together on the "
            f"way. Save the checkpoint as the model holds it (`save_original_format=False` in transformers), then load."
        )
    return planned


def _check_folder(planned: Sequence[PlannedTensor], options: LoadOptions) -> None:
    needing = [each for each in planned if each.place == DISK and each.stored is None]
    if not needing or options.offload_folder is not None:
        return
    first = needing[0]
    source = first.parts[0][0]
    if source.dtype != first.dtype and isinstance(source, StoredTensor):
        why = f"is stored in {source.dtype} and wanted in {first.dtype}"
    else:
        why = f"lies in `{source.path.name}` in a form that cannot be read in place"
    raise ConfigError(
        f"{len(needing)} tensors that are to stay on disk have to be written anew, and `offload_folder` does not say "
        f"where: `{first.of.name}` {why}. Give an `offload_folder`, or load safetensors with `dtype='auto'`, of which "
        f"nothing is written."
    )


def _local_box(name: str, tensor: DTensor) -> Box:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(each.is_partial() for each in tensor.placements):
        raise ConfigError(
            f"`{name}` is placed as {tensor.placements}: its values are a sum over ranks, to which no rank's part can "
            f"be loaded. Redistribute it first."
        )
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple((begin, begin + size) for begin, size in zip(offset, shape, strict=True))
