"""A model with quantized layers, from a checkpoint tensor by tensor or from the values it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from accel_bigmodel.loading.model_tensor import model_tensors
from accel_bigmodel.loading.place import MAP_STRATEGIES, DeviceMap
from accel_bigmodel.quantize.backend import Backend
from accel_bigmodel.quantize.filling import Filling
from accel_bigmodel.quantize.options import BnbQuantizationConfig, QuantizationConfig, TorchaoQuantizationConfig
from accel_bigmodel.quantize.placement import Placement, check_offload, infer_device_map, plan_placement
from accel_bigmodel.quantize.selection import Selection, select_layers
from accel_state.errors import ConfigError

__all__ = ["load_and_quantize_model"]


def load_and_quantize_model(
    model: nn.Module,
    bnb_quantization_config: QuantizationConfig,
    weights_location: str | Path | None = None,
    device_map: DeviceMap | int | str | torch.device | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    offload_state_dict: bool = False,
) -> nn.Module:
    """Quantize the linear layers of `model`, and load it on the way if there is a checkpoint.

    Each tensor is read, quantized or cast, and let go before the next one, so that beside the result no more than one
    is in memory in its original precision. The result has the names of `model`, tied parameters stay tied, and nothing
    of it requires a gradient: train adapters, as with peft, and let what shall be trained besides require one again.

    Which layers are quantized, see `BnbQuantizationConfig.skip_modules`. Everything else gets ``torch_dtype``, except
    for buffers that are not saved, which keep theirs.

    A checkpoint of a model that bitsandbytes quantized, by its ``state_dict`` or by transformers, is taken as it is.

    Args:
        model: changed in place. Without a checkpoint it has its values; with one it may be on the meta device, as
            `init_empty_weights` makes it.
        bnb_quantization_config: a `BnbQuantizationConfig`, or in spite of the name a `TorchaoQuantizationConfig`.
        weights_location: what `load_checkpoint_in_model` takes: a file, an index or a folder.
        device_map: what `dispatch_model` takes, one device, or a strategy of `infer_auto_device_map`. By default the
            model stays where it is, or goes to the accelerator if it has no values yet. On what may be offloaded, see
            `BnbQuantizationConfig.enable_offload`; int8 weights of torchao may lie on ``"cpu"``.
        no_split_module_classes: for a strategy, as `infer_auto_device_map` takes it.
        max_memory: for a strategy, as `infer_auto_device_map` takes it.
        offload_folder: where what is on ``"disk"`` is written, unless its file has it in the wanted dtype already.
            Until then it is in the host's memory.
        offload_state_dict: refused: no state dict is ever in memory that could be offloaded.

    Raises:
        ConfigError: if the settings do not fit the model or each other, or the model is quantized already.
        CheckpointError: if the checkpoint is damaged, or has other names, shapes or kinds of dtype than the model.
        MissingDependencyError: if the library that quantizes is not installed.
    """
    is_strategy = isinstance(device_map, str) and device_map in MAP_STRATEGIES
    _refuse(is_strategy, no_split_module_classes, max_memory, offload_state_dict)
    backend = _backend(bnb_quantization_config)
    selection = select_layers(model, bnb_quantization_config)
    if is_strategy:
        device_map = infer_device_map(
            model,
            selection,
            bnb_quantization_config,
            strategy=str(device_map),
            max_memory=max_memory,
            no_split_module_classes=no_split_module_classes,
        )
    filling, placement = _plan(model, backend, bnb_quantization_config, selection, device_map)
    if weights_location is None:
        filling.from_model()
    else:
        filling.from_checkpoint(Path(weights_location))
    model.requires_grad_(False)
    backend.mark(model)
    if placement.needs_dispatch and isinstance(device_map, Mapping):
        from accel_bigmodel.dispatch import dispatch_model  # here: one device needs none of what streams

        dispatch_model(
            model, device_map, placement.main, offload_dir=offload_folder, offload_index=filling.left_in_files
        )
    return model


def _plan(
    model: nn.Module,
    backend: Backend,
    config: QuantizationConfig,
    selection: Selection,
    device_map: DeviceMap | int | str | torch.device | None,
) -> tuple[Filling, Placement]:
    tensors = model_tensors(model)  # let go of on return, so that each can be freed when its turn has come
    placement = plan_placement(model, tensors, device_map)
    layers = check_offload(selection.layers, config, placement)
    return Filling(model, backend, config, layers, selection.float32, placement, tensors), placement


def _backend(config: QuantizationConfig) -> Backend:
    if isinstance(config, BnbQuantizationConfig):
        from accel_bigmodel.quantize.bitsandbytes_layers import BitsandbytesLayers

        return BitsandbytesLayers(config)
    if isinstance(config, TorchaoQuantizationConfig):
        from accel_bigmodel.quantize.torchao_layers import TorchaoLayers

        return TorchaoLayers(config)
    raise ConfigError(
        f"`bnb_quantization_config` is a `{type(config).__name__}`, which says nothing of how to quantize. Give a "
        f"`BnbQuantizationConfig` or a `TorchaoQuantizationConfig`."
    )


def _refuse(is_strategy: bool, no_split: object, max_memory: object, offload_state_dict: bool) -> None:
    if offload_state_dict:
        raise ConfigError(
            "`offload_state_dict=True` asks to keep the state dict on the disk while loading, but there is none: each "
            "tensor is read from its file when its turn comes. Drop it."
        )
    inferred = {"no_split_module_classes": no_split, "max_memory": max_memory}
    for name, given in inferred.items():
        if given is not None and not is_strategy:
            raise ConfigError(
                f"`{name}` is for a device map that is worked out, and here it is given or not needed. Drop it, or "
                f"give `device_map='auto'`."
            )
