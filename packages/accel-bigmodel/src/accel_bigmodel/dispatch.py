"""A model spread over devices, host memory and disk, as a device map says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import nn

from accel_bigmodel.offload.alignment import align
from accel_bigmodel.offload.division import HeldTensor, group_tensors, travelling
from accel_bigmodel.offload.folder import OffloadFile
from accel_bigmodel.offload.hooks import refuse_offloaded
from accel_bigmodel.offload.in_place import place_on_host
from accel_bigmodel.offload.offloading import place_on_device, resolve_device, to_disk
from accel_bigmodel.offload.streaming import Value, stream_tensors
from accel_bigmodel.placing import check_device_map
from accel_bigmodel.stored import StoredTensor
from accel_bigmodel.stream import AcceleratorTransfers, Transfers
from accel_state.errors import ConfigError

__all__ = ["DeviceTable", "dispatch_model"]

M = TypeVar("M", bound=nn.Module)
Place: TypeAlias = int | str | torch.device


class DeviceTable:
    """The devices that a map names. Tests have one of stand-ins."""

    def device(self, place: Place) -> torch.device:
        """The device of an entry that is not ``"disk"``."""
        return resolve_device(place)

    def transfers(self, place: Place) -> Transfers | None:
        """How it is reached; None for the host itself."""
        device = self.device(place)
        return None if device.type == "cpu" else AcceleratorTransfers(device)


def dispatch_model(
    model: M,
    device_map: Mapping[str, Place],
    main_device: Place | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | Path | None = None,
    offload_index: Mapping[str, StoredTensor] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    force_hooks: bool = False,
    *,
    num_slots: int = 3,
    pinned_memory: int | None = None,
) -> M:
    """Spread `model` over devices as `device_map` says.

    What is on a device computes there, and inputs are brought to it. What is on ``"cpu"`` or ``"disk"`` computes on the
    main device, and its blocks are brought there just before their forwards, ahead of time; see `cpu_offload`. Where
    the main device is the CPU itself, ``"cpu"`` is simply where the weights are, and ``"disk"`` means files that are
    mapped.

    Args:
        model: changed in place. Its ``hf_device_map`` says what was done.
        device_map: names of modules or tensors, the longest that fits counts, to a number of an accelerator, the name
            of a device, ``"cpu"`` or ``"disk"``. `infer_auto_device_map` makes one.
        main_device: where what is on the host computes; by default the first device of the map, else the CPU.
        state_dict: values of tensors that the model holds on the meta device, by name.
        offload_dir: where weights that are to be on disk are written, if they are in no file yet.
        offload_index: where weights lie in safetensors files, by the names that they have in the model. These are
            read there, and nothing is written.
        offload_buffers: whether buffers of modules on the host stay there too.
        skip_keys: keyword arguments, and entries of mappings, that are not brought to a module's device.
        preload_module_classes: see `cpu_offload`.
        force_hooks: whether inputs are brought to the device of a model that lies on one device only. By default such
            a model is just moved.
        num_slots: see `cpu_offload`.
        pinned_memory: see `cpu_offload`.

    Raises:
        CheckpointError: if the disk has no room.
        ConfigError: if the map does not fit the model, or a tensor has no value.
        OSError: if the folder cannot be written.
    """
    values: dict[str, Value] = {**(offload_index or {}), **(state_dict or {})}
    return dispatch(
        model, device_map, DeviceTable(), main_device=main_device, values=values, offload_dir=offload_dir,
        offload_buffers=offload_buffers, skip_keys=skip_keys or (),
        preload_module_classes=preload_module_classes, force_hooks=force_hooks, num_slots=num_slots,
        pinned_memory=pinned_memory,
    )  # fmt: skip


def dispatch(
    model: M,
    device_map: Mapping[str, Place],
    devices: DeviceTable,
    *,
    main_device: Place | None = None,
    values: Mapping[str, Value] | None = None,
    offload_dir: str | Path | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Collection[str] = (),
    preload_module_classes: Collection[str] | None = None,
    force_hooks: bool = False,
    num_slots: int = 3,
    pinned_memory: int | None = None,
) -> M:
    """`dispatch_model` on devices that are given."""
    refuse_offloaded(model)
    check_device_map(model, device_map)
    if main_device == "disk":
        raise ConfigError("`main_device='disk'` computes nothing. Give a device, such as `0` or `cpu`.")
    first = next((place for place in device_map.values() if not _is_host(place)), "cpu")
    main = first if main_device is None else main_device
    known = dict(values or {})
    transfers = devices.transfers(main)
    parts = _parts(group_tensors(model), device_map, offload_buffers=offload_buffers, main=main)
    file = _write_missing(parts.get("disk", []), known, offload_dir)
    streamed: list[HeldTensor] = []
    for place, tensors in parts.items():
        if not _is_host(place):
            place_on_device(tensors, known, devices.device(place))
        elif transfers is None:
            place_on_host(tensors, known)
        else:
            streamed += tensors
    if streamed:
        assert transfers is not None
        order = {each.name: number for number, each in enumerate(group_tensors(model))}
        stream_tensors(
            model, sorted(streamed, key=lambda each: order[each.name]), known, transfers=transfers,
            num_slots=num_slots, pinned_memory=pinned_memory, preload_module_classes=preload_module_classes, keep=file,
        )  # fmt: skip
    computes = {name: devices.device(main if _is_host(place) else place) for name, place in device_map.items()}
    if streamed or force_hooks or len(set(computes.values())) > 1:
        modules = dict(model.named_modules(remove_duplicate=False))
        where = {name: device for name, device in computes.items() if name in modules}
        align(model, {"": devices.device(main), **where}, skip_keys=skip_keys)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


def _is_host(place: Place) -> bool:
    return place in ("cpu", "disk") or (isinstance(place, torch.device) and place.type == "cpu")


def _parts(
    tensors: list[HeldTensor], device_map: Mapping[str, Place], *, offload_buffers: bool, main: Place
) -> dict[Place, list[HeldTensor]]:
    """What lies where. What does not travel, see `travelling`, lies on the main device if its module is on the host."""
    found: dict[Place, list[HeldTensor]] = {}
    travel = set(travelling(tensors, offload_buffers=offload_buffers))
    for tensor in tensors:
        place = _place_of(tensor.name, device_map)
        if _is_host(place) and tensor not in travel:
            place = main
        found.setdefault("cpu" if place != "disk" and _is_host(place) else place, []).append(tensor)
    return found


def _place_of(name: str, device_map: Mapping[str, Place]) -> Place:
    while name not in device_map:
        assert name, "the map was checked"
        name = name.rpartition(".")[0]
    return device_map[name]


def _write_missing(
    tensors: list[HeldTensor], values: dict[str, Value], folder: str | Path | None
) -> OffloadFile | None:
    """Write what is to be on disk and is in no file yet, and say in `values` where it is."""
    missing = [each for each in tensors if not any(isinstance(values.get(n), StoredTensor) for n in each.names)]
    if not missing:
        return None
    if folder is None:
        raise ConfigError(
            f"`device_map` puts `{missing[0].name}` on disk, but it is in no file that is known, and there is no "
            f"`offload_dir` to write it to. Give `offload_dir`, or where it lies in `offload_index`."
        )
    return to_disk(missing, values, folder)
