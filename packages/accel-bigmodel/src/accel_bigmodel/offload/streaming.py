"""A model's tensors handed to the engine: each group a unit, its values in pinned memory or in files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from accel_bigmodel.offload.division import Group, HeldTensor, divide
from accel_bigmodel.offload.hooks import attach
from accel_bigmodel.offload.tensor import MovedTensor, pieces_of
from accel_bigmodel.offload.unit import Unit
from accel_bigmodel.stored import StoredTensor
from accel_bigmodel.stream import Engine, FileSource, HostMemory, Layout, OpenFile, Source, Transfers
from accel_state.errors import ConfigError

__all__ = ["Value", "make_unit", "stream_tensors", "value_of"]

Value = torch.Tensor | StoredTensor


def stream_tensors(
    model: nn.Module,
    tensors: Sequence[HeldTensor],
    values: Mapping[str, Value],
    *,
    transfers: Transfers,
    num_slots: int = 3,
    pinned_memory: int | None = None,
    preload_module_classes: Collection[str] | None = None,
    keep: object = None,
) -> None:
    """Have `tensors` on the device of `transfers` only while a forward needs them.

    Args:
        model: its modules get hooks, and placeholders for the tensors.
        tensors: which ones.
        values: what they hold, by one of their names, where the model itself holds nothing. A `StoredTensor` stays in
            its file.
        transfers: the device.
        num_slots: see `Engine`.
        pinned_memory: bytes of host memory that may be pinned; None for no limit.
        preload_module_classes: see `divide`.
        keep: what has to live as long as anybody reads from the files.
    """
    engine = Engine(transfers, num_slots=num_slots)
    memory = HostMemory(transfers, budget_bytes=pinned_memory)
    files: dict[Path, OpenFile] = {}
    for group in divide(model, tensors, preload_module_classes=preload_module_classes):
        stays = [each for each in group.tensors if isinstance(value_of(each, values), StoredTensor)]
        comes = [each for each in group.tensors if not isinstance(value_of(each, values), StoredTensor)]
        for part, is_stored in ((comes, False), (stays, True)):
            if part:
                same = Group(group.name, group.modules, part)
                make_unit(same, values, engine, memory, is_stored=is_stored, keep=keep, files=files)


def value_of(tensor: HeldTensor, values: Mapping[str, Value]) -> Value:
    """What a tensor of the model holds, or is to hold.

    Raises:
        ConfigError: if that is nowhere.
    """
    found = next((values[name] for name in tensor.names if name in values), None)
    if found is None:
        if tensor.value.device.type == "meta":
            raise ConfigError(
                f"`{tensor.name}` was to be offloaded, but is on the meta device and has no values. Load a checkpoint, "
                f"as `load_checkpoint_and_dispatch` does, or give its value in `state_dict`."
            )
        return tensor.value
    shape = tuple(found.shape)
    if shape != tuple(tensor.value.shape):
        raise ConfigError(
            f"`{tensor.name}` has the shape {list(tensor.value.shape)}, but the value given for it has {list(shape)}. "
            f"Give the weights of a model of the same sizes."
        )
    return found


def make_unit(
    group: Group,
    values: Mapping[str, Value],
    engine: Engine,
    memory: HostMemory,
    *,
    is_stored: bool,
    keep: object = None,
    files: dict[Path, OpenFile] | None = None,
) -> Unit:
    """The unit of one group, attached to its modules, which hold placeholders from then on.

    Args:
        group: its tensors, all in files or none.
        values: as for `stream_tensors`.
        engine: what moves it.
        memory: where values lie that are in no file.
        is_stored: whether they are in files.
        keep: as for `stream_tensors`.
        files: that are open already, to be added to.
    """
    device = engine.transfers.device
    moved = [MovedTensor(each.name, each.places, each.value, device) for each in group.tensors]
    source = _from_files(group, values, keep, files) if is_stored else _on_host(group, values, memory)
    unit = Unit(engine, group.name, moved, source)
    attach(unit, group.modules)
    return unit


def _from_files(group: Group, values: Mapping[str, Value], keep: object, files: dict[Path, OpenFile] | None) -> Source:
    stored = []
    for tensor in group.tensors:
        value = value_of(tensor, values)
        assert isinstance(value, StoredTensor)
        stored.append(value)
    layout = Layout.of([each.shape for each in stored], [each.value.dtype for each in group.tensors])
    for tensor in group.tensors:
        tensor.value = torch.empty(0)  # it lies in the source now
    return FileSource(layout, stored, keep=keep, files=files)


def _on_host(group: Group, values: Mapping[str, Value], memory: HostMemory) -> Source:
    """Each value is let go once it is copied, so that no more than one unit is there twice."""
    shapes: list[torch.Size] = []
    dtypes: list[torch.dtype] = []
    for tensor in group.tensors:
        value = value_of(tensor, values)
        assert not isinstance(value, StoredTensor)
        pieces = pieces_of(_with_dtype(value, tensor))
        shapes += [piece.shape for piece in pieces]
        dtypes += [piece.dtype for piece in pieces]
    source = memory.source(Layout.of(shapes, dtypes))
    index = 0
    for tensor in group.tensors:
        value = value_of(tensor, values)
        assert not isinstance(value, StoredTensor)
        for piece in pieces_of(_with_dtype(value, tensor)):
            source.writable(index).copy_(piece.detach())
            index += 1
        tensor.value = torch.empty(0)  # it lies in the source now
    return source


def _with_dtype(value: torch.Tensor, tensor: HeldTensor) -> torch.Tensor:
    """A value that was given takes the dtype that the model has."""
    return value if value is tensor.value else value.detach().to(tensor.value.dtype)
