"""On which device each tensor of a model that is being quantized goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from accel_bigmodel.loading.model_tensor import ModelTensor
from accel_bigmodel.loading.place import DISK, DeviceMap, Place, places_of
from accel_bigmodel.quantize.options import BnbQuantizationConfig, QuantizationConfig
from accel_state.device import available_kind
from accel_state.errors import ConfigError

__all__ = ["Placement", "check_offload", "plan_placement"]


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
