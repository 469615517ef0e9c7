"""`load_checkpoint_and_dispatch`: a device map, the weights, and what streams those that lie elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from accel_bigmodel.loading.checkpoint import load_checkpoint_in_model, refuse_foreign
from accel_bigmodel.loading.delivery import ReadSettings
from accel_bigmodel.loading.fused import parts_of
from accel_bigmodel.loading.model_tensor import model_tensors
from accel_bigmodel.loading.place import MAP_STRATEGIES, DeviceMap
from accel_bigmodel.loading.source import open_checkpoint
from accel_state.errors import ConfigError

__all__ = ["load_checkpoint_and_dispatch"]


M = TypeVar("M", bound=nn.Module)


def load_checkpoint_and_dispatch(
    model: M,
    checkpoint: str | Path,
    device_map: DeviceMap | int | str | torch.device | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Collection[str] | str | None = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    force_hooks: bool = False,
    strict: bool = True,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    mmap: bool = False,
    progress: bool | None = None,
    reading: ReadSettings | None = None,
) -> M:
    """Fill `model` from a checkpoint and make it run wherever its parts lie. Returns `model`.

    Joins `infer_auto_device_map`, `load_checkpoint_in_model` and `dispatch_model`; what they say holds here. Weights on
    the host and on disk are streamed to the main device in each forward. Without a map, the model is only filled.

    Args:
        model: any module, best of `init_empty_weights`.
        checkpoint: as for `load_checkpoint_in_model`.
        device_map: where each module goes; or ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` or ``"sequential"`` to
            have that worked out; or one device for all.
        max_memory: budgets for a map that is worked out, by device, ``"cpu"`` or ``"disk"``.
        no_split_module_classes: classes whose modules stay whole in such a map. By default found by themselves.
        offload_folder: as for `load_checkpoint_in_model`: only written to where weights on disk change their form.
        offload_buffers: whether buffers of streamed modules are streamed too.
        dtype: as for `load_checkpoint_in_model`; a map is worked out for it.
        offload_state_dict: as for `load_checkpoint_in_model`: refused.
        skip_keys: keyword arguments that stay on their device, see `dispatch_model`.
        preload_module_classes: see `dispatch_model`.
        force_hooks: see `dispatch_model`.
        strict: as for `load_checkpoint_in_model`.
        full_state_dict: likewise.
        broadcast_from_rank0: likewise.
        mmap: likewise.
        progress: likewise.
        reading: likewise.

    Raises:
        ConfigError: if an argument does not fit, nothing fits into the budgets, or a setting has no effect.
        CheckpointError: as for `load_checkpoint_in_model`.
        OSError: if a file cannot be read or written.
    """
    refuse_foreign(offload_state_dict=offload_state_dict, full_state_dict=full_state_dict)
    settings: dict[str, Any] = {
        "skip_keys": skip_keys, "preload_module_classes": preload_module_classes, "force_hooks": force_hooks
    }  # fmt: skip
    planning = {"max_memory": max_memory, "no_split_module_classes": no_split_module_classes}
    if isinstance(device_map, str) and device_map in MAP_STRATEGIES:
        device_map = _infer(model, checkpoint, device_map, dtype, offload_buffers=offload_buffers, **planning)
    else:
        _refuse_unused(planning, "no device map is worked out", "`device_map='auto'`")
    if device_map is None:
        _refuse_unused(settings, "without a device map nothing is dispatched", "a `device_map`")
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    result = load_checkpoint_in_model(
        model,
        checkpoint,
        device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_buffers=offload_buffers,
        strict=strict,
        broadcast_from_rank0=broadcast_from_rank0,
        mmap=mmap,
        progress=progress,
        reading=reading,
    )
    if device_map is None:
        return model
    from accel_bigmodel.dispatch import dispatch_model  # here: loading alone needs none of what streams

    return dispatch_model(
        model, dict(device_map), offload_index=dict(result.stored), offload_buffers=offload_buffers, **settings
    )


def _infer(
    model: nn.Module,
    checkpoint: str | Path,
    strategy: str,
    dtype: torch.dtype | str | None,
    *,
    max_memory: Any,
    no_split_module_classes: Any,
    offload_buffers: bool,
) -> DeviceMap:
    from accel_bigmodel.placing import infer_auto_device_map  # here: a map that is given needs no planning

    as_stored = _stored_dtypes(model, checkpoint) if dtype == "auto" else None
    return infer_auto_device_map(
        model,
        max_memory,
        no_split_module_classes=no_split_module_classes,
        dtype=None if dtype == "auto" else dtype,
        special_dtypes=as_stored,
        offload_buffers=offload_buffers,
        strategy=strategy,  # type: ignore[arg-type] # one of `MAP_STRATEGIES`
    )


def _stored_dtypes(model: nn.Module, checkpoint: str | Path) -> dict[str, torch.dtype]:
    """Those that the model's floating-point tensors will have, by each of their names."""
    sources = open_checkpoint(checkpoint)
    tensors = [each for each in model_tensors(model) if each.tensor.is_floating_point()]
    parts = parts_of(model, sources, {name for each in tensors for name in each.names})
    found = {}
    for each in tensors:
        held = next((parts[name] for name in each.names if name in parts), [])
        dtypes = {sources[part.source].dtype for part in held}
        if len(dtypes) == 1:
            found.update(dict.fromkeys(each.names, dtypes.pop()))
    return found


def _refuse_unused(settings: Mapping[str, Any], why: str, remedy: str) -> None:
    given = [name for name, value in settings.items() if value]
    if given:
        raise ConfigError(
            f"`{given[0]}={settings[given[0]]!r}` was given, but {why}, so it would have no effect. Leave it out, or "
            f"give {remedy}."
        )
