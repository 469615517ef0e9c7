"""`load_checkpoint_in_model`: the weights of a checkpoint, read right to where a model needs them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from accel_bigmodel.loading.carry_out import carry_out
from accel_bigmodel.loading.delivery import Delivery, ReadSettings
from accel_bigmodel.loading.doubled import check_doubled
from accel_bigmodel.loading.engine import deliver
from accel_bigmodel.loading.place import DeviceMap
from accel_bigmodel.loading.plan import LoadOptions, plan_load
from accel_bigmodel.loading.progress import Progress
from accel_bigmodel.loading.result import LoadedCheckpoint
from accel_bigmodel.loading.shared import load_shared
from accel_bigmodel.loading.source import open_checkpoint
from accel_bigmodel.offload.hooks import refuse_offloaded
from accel_state.errors import ConfigError
from accel_state.logging import get_logger
from accel_state.process import Process

__all__ = ["load_checkpoint_in_model", "refuse_foreign"]


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: DeviceMap | int | str | torch.device | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Collection[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = True,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    mmap: bool = False,
    progress: bool | None = None,
    reading: ReadSettings | None = None,
) -> LoadedCheckpoint:
    """Fill `model` from a checkpoint, without ever holding a second copy of it.

    The memory of each parameter is made once, on its device and in its dtype, and several threads read into it; dtypes
    are converted on the way. A parameter that is where and what it should be is overwritten and stays the same object;
    others are replaced, so make optimizers afterwards. All that can be checked is checked before anything is changed.
    After an error in reading, parameters without values still have none, those that were to move have none any more,
    and others may hold old and new ones.

    What is mapped to ``"disk"`` becomes a parameter without values (on the meta device) and stays in its file; see
    `LoadedCheckpoint.stored`. Nothing is written where safetensors hold it in the dtype that is wanted; otherwise one
    file is, in `offload_folder`, and found again by the next such load. Where nothing maps to it, no folder is used.

    Args:
        model: any module, also of `init_empty_weights`. Sharded parameters (``DTensor``) take this rank's part.
        checkpoint: a ``.safetensors`` file, an index of several, or their folder. ``.bin`` and ``.pt`` files are read
            with ``weights_only`` and mapped; where both kinds lie in a folder, safetensors are taken.
        device_map: names of modules or tensors and where they go, or one device for all. By default everything stays
            where it is, and parameters without values get theirs on the CPU.
        offload_folder: where tensors are written that stay on disk, but not as they are stored.
        dtype: of floating-point tensors. ``None``: the model's; ``"auto"``: as stored, which is fastest.
        offload_state_dict: tensors never gather on the way to a device here, so there is nothing to offload: refused.
        offload_buffers: whether buffers of modules on disk stay there too, instead of being loaded to the CPU.
        keep_in_fp32_modules: modules whose tensors become float32 whatever `dtype` says, by a part of the dotted name.
        offload_8bit_bnb: refused; see `load_and_quantize_model`.
        strict: whether both sides must hold the same names. Otherwise the result says what is left, and what is missing
            stays as it is. Shapes must fit either way. What a model class of transformers declares as ignorable is
            never asked for. A tied parameter is there if one of its names is.
        full_state_dict: checkpoints that each rank saved a part of are refused; see `Accelerator.load_state`.
        broadcast_from_rank0: every rank must then call this. Only ranks on the node of rank 0 read, each another part,
            and send it to all; others need not see the files. Every rank may have a map of its own.
        mmap: whether files become the memory of what goes to the CPU in the dtype that is stored. Then nothing is read
            before it is used, and processes share one copy; but the files must not change as long as the model lives,
            and what is written to it gets memory of its own. Memory that a parameter has already is filled either way.
        progress: whether a bar is shown. By default only where loading takes more than two seconds.
        reading: how many threads read how much at once.

    Raises:
        ConfigError: if an argument does not fit the model or the machine.
        CheckpointError: if the checkpoint is damaged, incomplete, or does not fit the model.
        OSError: if a file cannot be read or written.
    """
    refuse_offloaded(model)
    refuse_foreign(
        offload_state_dict=offload_state_dict, offload_8bit_bnb=offload_8bit_bnb, full_state_dict=full_state_dict
    )
    options = LoadOptions(
        device_map=device_map,
        offload_folder=None if offload_folder is None else Path(offload_folder),
        dtype=dtype,
        offload_buffers=offload_buffers,
        keep_in_fp32_modules=_as_names(keep_in_fp32_modules),
        strict=strict,
        mmap=mmap,
        progress=progress,
        reading=reading or ReadSettings(),
    )
    path = Path(checkpoint)
    process = Process.current() if broadcast_from_rank0 and Process.is_open() else None
    if process is None or process.topology.world_size == 1:
        result = _load_alone(model, path, options)
    else:
        result = load_shared(model, path, options, process)
    get_logger(__name__).log(_level(result), "%s", result)
    return result


def _load_alone(model: nn.Module, path: Path, options: LoadOptions) -> LoadedCheckpoint:
    sources = open_checkpoint(path)
    plan = plan_load(model, sources, options, path)
    if options.strict:
        check_doubled(plan.match, sources, options.reading)

    def read(deliveries: Sequence[Delivery]) -> int:
        total = sum(each.target.numel() * each.source.dtype.itemsize for each in deliveries)
        with Progress(total, shown=options.progress) as progress:
            return deliver(deliveries, options.reading, progress=progress)

    return carry_out(model, plan, options, read)


def _as_names(names: Collection[str] | None) -> Collection[str] | None:
    return [names] if isinstance(names, str) else names


def _level(result: LoadedCheckpoint) -> int:
    import logging

    return logging.WARNING if result.missing or result.unexpected else logging.DEBUG


def refuse_foreign(
    *, offload_state_dict: bool | None = None, offload_8bit_bnb: bool = False, full_state_dict: bool = True
) -> None:
    """Refuse settings of other libraries that have nothing to set here.

    Raises:
        ConfigError: naming what to use instead.
    """
    if offload_state_dict:
        raise ConfigError(
            "`offload_state_dict=True` moves tensors to disk that gather in memory while a checkpoint is loaded, and "
            "here none do: each is read right to where it belongs. Leave it out."
        )
    if offload_8bit_bnb:
        raise ConfigError(
            "`offload_8bit_bnb=True` concerns quantized weights, and this loads them as they are stored. Use "
            "`load_and_quantize_model`, which quantizes while it loads."
        )
    if not full_state_dict:
        raise ConfigError(
            "`full_state_dict=False` means a checkpoint of which each rank saved its part, and this reads whole "
            "tensors (into sharded models too). Use `Accelerator.load_state` for what `save_state` wrote, or "
            "`accel checkpoint consolidate` to make it whole."
        )
