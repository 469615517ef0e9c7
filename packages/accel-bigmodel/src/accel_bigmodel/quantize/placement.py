"""On which device each tensor of a model that is being quantized goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from accel_bigmodel.loading.model_tensor import ModelTensor
from accel_bigmodel.loading.place import DISK, DeviceMap, Place, places_of
from accel_bigmodel.quantize.options import BnbQuantizationConfig, QuantizationConfig
from accel_bigmodel.quantize.selection import Selection
from accel_state.device import available_kind
from accel_state.dtypes import parse_dtype
from accel_state.errors import ConfigError

__all__ = ["Placement", "check_offload", "infer_device_map", "plan_placement"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the tensors of a model go."""

    places: Mapping[str, Place]
    """By the first name of each."""
    main: torch.device
    """Where what is offloaded computes."""

    def is_offloaded(self, name: str) -> bool:
        """Whether the tensor lies elsewhere than where it computes."""
        place = self.places[name]
        return isinstance(place, str) or (place.type == "cpu" and self.main.type != "cpu")

    def device(self, name: str) -> torch.device:
        """Where the tensor is made: where it lies, or in the host's memory if that is the disk."""
        place = self.places[name]
        return torch.device("cpu") if isinstance(place, str) else place

    @property
    def needs_dispatch(self) -> bool:
        """Whether inputs and tensors have to travel in a forward."""
        return len(set(self.places.values())) > 1


def infer_device_map(
    model: nn.Module,
    selection: Selection,
    config: QuantizationConfig,
    *,
    strategy: str,
    max_memory: Mapping[int | str, int | str] | None,
    no_split_module_classes: Iterable[str] | str | None,
) -> DeviceMap:
    """A device map by the sizes that `model` will have: bits of quantized weights with their scales, rounded up.

    The scales of int8 weights are not counted.

    Args:
        model: not quantized yet.
        selection: what will be quantized.
        config: to what.
        strategy: one of `MAP_STRATEGIES`.
        max_memory: as for `infer_auto_device_map`.
        no_split_module_classes: likewise.
    """
    from accel_bigmodel.placing import infer_auto_device_map  # here: a map that is given needs no planning

    special = dict.fromkeys(selection.float32, torch.float32)
    special |= {f"{name}.weight": _packed_dtype(config) for name in selection.layers}
    return infer_auto_device_map(
        model,
        max_memory,
        no_split_module_classes=no_split_module_classes,
        dtype=config.torch_dtype,
        special_dtypes=special,
        strategy=strategy,  # type: ignore[arg-type] # one of `MAP_STRATEGIES`
    )


def _packed_dtype(config: QuantizationConfig) -> torch.dtype:
    """The smallest that is as wide as a quantized weight with its part of the scales."""
    if isinstance(config, BnbQuantizationConfig):
        # 4 bits and a float32 for 64 of them, which double quantization makes a byte.
        return torch.int8 if config.load_in_8bit else parse_dtype("uint5")
    if config.weights == "int8" or config.group_size is None:
        return torch.int8
    scale_bits = 2 * (32 if config.torch_dtype in (None, torch.float32) else 16)  # and a zero point
    return parse_dtype("uint5" if scale_bits <= config.group_size else "uint6")


def plan_placement(
    model: nn.Module, tensors: Sequence[ModelTensor], device_map: DeviceMap | int | str | torch.device | None
) -> Placement:
    """Decide where everything of `model` goes.

    Args:
        model: not quantized yet.
        tensors: those of `model`.
        device_map: devices by name, or one device. ``None``: where the model is, or if its parameters have no values
            yet, on the accelerator of this process, else the CPU.

    Raises:
        ConfigError: if the map misses a tensor, or names what is not there.
    """
    if device_map is None and all(each.device.type == "meta" for each in model.parameters()):
        kind = available_kind()
        index = kind.call("current_device") if kind.indexed else None
        device_map = torch.device(kind.type) if index is None else torch.device(kind.type, index)
    places = places_of(model, tensors, device_map)
    computing = [place for place in places.values() if isinstance(place, torch.device) and place.type != "cpu"]
    return Placement(places, computing[0] if computing else torch.device("cpu"))


def check_offload(layers: Sequence[str], config: QuantizationConfig, placement: Placement) -> tuple[str, ...]:
    """Those of `layers` that are to be quantized, in view of what is offloaded.

    Raises:
        ConfigError: if something is to be offloaded that cannot be.
    """
    moved = [name for name in placement.places if placement.is_offloaded(name)]
    if not moved:
        return tuple(layers)
    if placement.main.type == "cpu":
        raise ConfigError(
            f"`device_map` puts {moved[0]!r} on the disk with nothing but the CPU to compute on, and what is "
            f"quantized is made in memory. Put it on 'cpu', or use `load_checkpoint_and_dispatch` without quantizing."
        )
    if isinstance(config, BnbQuantizationConfig):
        if not config.enable_offload:
            raise ConfigError(
                f"`device_map` puts {moved[0]!r} on 'cpu' or 'disk' beside {str(placement.main)!r}. The layers of "
                f"bitsandbytes keep scales outside of their tensors, so they cannot be streamed to where they compute. "
                f"Give them a place on the device, or `enable_offload=True`, which leaves offloaded layers unquantized."
            )
        return tuple(name for name in layers if not placement.is_offloaded(f"{name}.weight"))
    for name in layers:
        place = placement.places[f"{name}.weight"]
        if placement.is_offloaded(f"{name}.weight") and (config.weights == "int4" or place == DISK):
            reason = "an int4 weight has the layout of one device" if place != DISK else "it is in no file"
            raise ConfigError(
                f"`device_map` puts {name!r} on {str(place)!r} beside {str(placement.main)!r}, but quantized it cannot "
                f"be streamed from there: {reason}. Put it on the device, on 'cpu' with `weights='int8'`, or into "
                f"`skip_modules`."
            )
    return tuple(layers)
