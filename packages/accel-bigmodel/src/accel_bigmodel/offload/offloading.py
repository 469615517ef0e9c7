"""Weights that stay in host memory or on disk, and taking that back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from accel_bigmodel.offload.alignment import align, unalign
from accel_bigmodel.offload.division import HeldTensor, group_tensors, travelling
from accel_bigmodel.offload.folder import OffloadFile
from accel_bigmodel.offload.hooks import detach, refuse_offloaded, units_of
from accel_bigmodel.offload.in_place import place_on_host
from accel_bigmodel.offload.streaming import Value, stream_tensors, value_of
from accel_bigmodel.stored import StoredTensor
from accel_bigmodel.stream import AcceleratorTransfers
from accel_state.device import DEVICES, available_kind, select_device
from accel_state.errors import ConfigError

__all__ = ["cpu_offload", "disk_offload", "has_offloaded_params", "remove_hooks", "resolve_device"]

M = TypeVar("M", bound=nn.Module)


def cpu_offload(
    model: M,
    execution_device: torch.device | str | int | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Collection[str] | None = None,
    *,
    num_slots: int = 3,
    pinned_memory: int | None = None,
) -> M:
    """Keep the weights of `model` in host memory, and bring each block to the device just before its forward.

    While a block computes, the ones that follow are on their way. What the model computes is the same as if it were on
    the device. Outputs are on the device of the inputs. Parameters that require gradients, in a model where others are
    frozen, are trained and stay on the device, so adapters can be trained; the graph of a forward keeps no weights.

    Args:
        model: changed in place. Its weights move to pinned memory; parameters are on the meta device between forwards.
        execution_device: where forwards run; by default the accelerator of this process. On the CPU the weights are
            already where they are needed, and nothing is changed.
        offload_buffers: whether buffers stay on the host too. By default they are on the device, as they are small.
        state_dict: values of weights that the model holds on the meta device.
        preload_module_classes: names of classes of modules that read weights of their children without calling them:
            everything in them comes at once.
        num_slots: units that may be on the device at a time; 1 fetches nothing ahead.
        pinned_memory: bytes of host memory that may be pinned, by default as many as there are. What is not pinned
            arrives slower.

    Raises:
        ConfigError: if a weight has no value, or a setting makes no sense.
    """
    device = resolve_device(execution_device)
    return _offload(
        model, device, dict(state_dict or {}), None, offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes, num_slots=num_slots, pinned_memory=pinned_memory,
    )  # fmt: skip


def disk_offload(
    model: M,
    offload_dir: str | Path,
    execution_device: torch.device | str | int | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Collection[str] | None = None,
    *,
    num_slots: int = 3,
    offload_index: Mapping[str, StoredTensor] | None = None,
) -> M:
    """Keep the weights of `model` on disk, and read each block just before its forward.

    Weights that are in safetensors files already are read from there and not written again, as `offload_index` says, or
    `load_checkpoint_and_dispatch` by itself. Others are written to `offload_dir`, in a file that is removed
    with the model. On the CPU the files are mapped and nothing is copied.

    Args:
        model: changed in place, as by `cpu_offload`.
        offload_dir: where weights are written. It should be a fast disk with room for them.
        execution_device: as for `cpu_offload`.
        offload_buffers: as for `cpu_offload`.
        preload_module_classes: as for `cpu_offload`.
        num_slots: as for `cpu_offload`.
        offload_index: where weights lie already, from `read_index`, by the names that they have in the model.

    Raises:
        CheckpointError: if the disk has no room.
        ConfigError: if a weight has no value, or a setting makes no sense.
        OSError: if the folder cannot be written.
    """
    device = resolve_device(execution_device)
    return _offload(
        model, device, dict(offload_index or {}), offload_dir, offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes, num_slots=num_slots, pinned_memory=None,
    )  # fmt: skip


def _offload(
    model: M,
    device: torch.device,
    values: dict[str, Value],
    folder: str | Path | None,
    *,
    offload_buffers: bool,
    preload_module_classes: Collection[str] | None,
    num_slots: int,
    pinned_memory: int | None,
) -> M:
    refuse_offloaded(model)
    tensors = group_tensors(model)
    moved = travelling(tensors, offload_buffers=offload_buffers)
    travel = set(moved)
    kept = [each for each in tensors if each not in travel]
    file = None
    if folder is not None:
        file = to_disk(moved, values, folder)
    if device.type == "cpu":
        place_on_host(tensors, values)
        return model
    place_on_device(kept, values, device)
    stream_tensors(
        model, moved, values, transfers=AcceleratorTransfers(device), num_slots=num_slots, pinned_memory=pinned_memory,
        preload_module_classes=preload_module_classes, keep=file,
    )  # fmt: skip
    align(model, {"": device})
    model.hf_device_map = {"": "cpu" if folder is None else "disk"}  # type: ignore[assignment]
    return model


def to_disk(tensors: Sequence[HeldTensor], values: dict[str, Value], folder: str | Path) -> OffloadFile:
    """Write those of `tensors` that are in no file yet, and say in `values` where they are."""
    written = {}
    for tensor in tensors:
        value = value_of(tensor, values)
        if isinstance(value, torch.Tensor):
            written[tensor.name] = value.detach().to(tensor.value.dtype)
    file = OffloadFile(folder, written)
    values.update(file.stored)
    return file


def place_on_device(tensors: Sequence[HeldTensor], values: Mapping[str, Value], device: torch.device) -> None:
    """Have the model hold `tensors` on `device`."""
    place_on_host([each for each in tensors if any(name in values for name in each.names)], values)
    for tensor in tensors:
        value_of(tensor, values)  # there is one
        now = tensor.places[0].get()
        if now.device == device:
            continue  # classes of quantized weights keep more than a parameter made anew would
        moved = now.detach().to(device)
        if isinstance(now, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=now.requires_grad)
        for place in tensor.places:
            place.put(moved)


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether parameters that `module` itself holds, not its children, are on the device only while they are needed."""
    return any(
        place.is_parameter and place.module() is module
        for unit in units_of(module, recurse=False)
        for tensor in unit.tensors
        for place in tensor.places
    )


def remove_hooks(model: M) -> M:
    """Give `model` its weights back, on the host, and take away everything that moved them or its inputs.

    Weights on other devices stay there. It needs host memory for what was on disk. Given a part of a model, it does the
    same with all that travels together with weights of that part, as an embedding that is tied to it.
    """
    for unit in units_of(model):
        unit.put_for_good()
        detach(unit)
    unalign(model)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    return model


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """The device of this process where none is given.

    Raises:
        ConfigError: if there is no such device.
    """
    if device is None:
        return select_device(None)[1]
    if isinstance(device, int):
        kind = available_kind()
        if device >= kind.count() or kind.type == "cpu":
            raise ConfigError(
                f"Device {device} was asked for, but this process sees {kind.count() if kind.type != 'cpu' else 0} "
                f"accelerators. Give one that is here, or `cpu`."
            )
        return select_device(kind.type, local_rank=device)[1]
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device. Give a number, or a name such as `cuda:0` or `cpu`.") from error
    if found.type in DEVICES and not DEVICES[found.type].is_available():
        raise ConfigError(
            f"`{device}` was asked for, but torch {torch.__version__} sees no such device in this process. Give one "
            f"that is here, such as `{available_kind().type}`."
        )
    if found.type == "meta":
        raise ConfigError(
            "`execution_device='meta'` computes nothing. Give the device where forwards run, such as `cuda:0` or `cpu`."
        )
    return found if found.type == "cpu" or found.index is not None else torch.empty(0, device=found).device
