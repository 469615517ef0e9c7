"""Where each tensor goes, and in which dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import nn

from accel_bigmodel.loading.model_tensor import ModelTensor
from accel_state.config import did_you_mean
from accel_state.device import available_kind, device_kind
from accel_state.dtypes import parse_dtype
from accel_state.errors import ConfigError

__all__ = ["DISK", "MAP_STRATEGIES", "DTypeRule", "DeviceMap", "Place", "places_of"]

DISK: Literal["disk"] = "disk"
"""What a device map calls tensors that stay in files."""
Place: TypeAlias = torch.device | Literal["disk"]
DeviceMap: TypeAlias = Mapping[str, int | str | torch.device]

MAP_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def places_of(
    model: nn.Module, tensors: Sequence[ModelTensor], device_map: DeviceMap | int | str | torch.device | None
) -> dict[str, Place]:
    """Where each tensor goes, by its first name.

    Without a map each stays where it is, and those without values go to the CPU. A tensor whose names are mapped to
    several places goes to the first one that computes, else to the host's memory.

    Raises:
        ConfigError: if the map names what the model does not have, leaves something out, or names a device that is not
            here.
    """
    if device_map is None:
        cpu = torch.device("cpu")
        return {each.name: cpu if each.tensor.device.type == "meta" else each.tensor.device for each in tensors}
    if not isinstance(device_map, Mapping):
        if device_map in MAP_STRATEGIES:
            raise ConfigError(
                f"`device_map={device_map!r}` asks for a map to be made, and `load_checkpoint_in_model` only follows "
                f"one. Use `load_checkpoint_and_dispatch`, or give the map that `infer_auto_device_map` makes."
            )
        device_map = {"": device_map}
    _check_names(model, tensors, device_map)
    resolved = {name: _resolve(name, value) for name, value in device_map.items()}
    found: dict[str, Place] = {}
    lost: list[str] = []
    for each in tensors:
        places = [place for name in each.names if (place := _covering(name, resolved)) is not None]
        if places:
            found[each.name] = min(places, key=_rank)
        else:
            lost.append(each.name)
    if lost:
        raise ConfigError(
            f"`device_map` says nothing of {len(lost)} of the model's tensors, `{lost[0]}` the first. Add an entry for "
            f"`{lost[0].rpartition('.')[0] or lost[0]}`, or one for {''!r}, which holds for all that is not named."
        )
    return found


def _check_names(model: nn.Module, tensors: Sequence[ModelTensor], device_map: DeviceMap) -> None:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for each in tensors for name in each.names}
    for name in device_map:
        if name not in known:
            raise ConfigError(
                f"`device_map` names {name!r}, but the {type(model).__name__} has no module or tensor of that name."
                f"{did_you_mean(name, sorted(known))} Give names as `model.named_modules()` shows them."
            )


def _resolve(name: str, value: int | str | torch.device) -> Place:
    if value == DISK:
        return DISK
    try:
        device = torch.device(available_kind().type, value) if isinstance(value, int) else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"`device_map` puts {name!r} on {value!r}, which is no device. Give a number of an accelerator, `cpu`, "
            f"`disk`, or a name such as `cuda:1`."
        ) from error
    kind = device_kind(device.type)
    if device.type == "cpu" and not isinstance(value, int):
        return torch.device("cpu")
    count = 0 if device.type == "cpu" else kind.count()
    if (device.index or 0) >= count:
        raise ConfigError(
            f"`device_map` puts {name!r} on {value!r}, but this process sees {count} accelerators of that kind. Map it "
            f"to `cpu`, or to one that is here."
        )
    return device if device.index is not None else torch.empty(0, device=device).device


def _covering(name: str, resolved: Mapping[str, Place]) -> Place | None:
    """What the map says of a tensor: the longest name that it has or lies in."""
    while name and name not in resolved:
        name = name.rpartition(".")[0]
    return resolved.get(name)


def _rank(place: Place) -> int:
    if isinstance(place, str):
        return 2
    return 1 if place.type == "cpu" else 0


class DTypeRule:
    """Which dtype a tensor gets: `dtype` for floating-point ones, unless it is to stay in float32.

    Args:
        tensors: those of the model.
        dtype: ``None`` leaves the model's, ``"auto"`` takes what is stored.
        keep_in_fp32_modules: parts of dotted names.

    Raises:
        ConfigError: if `dtype` is not floating-point, or a name is in no tensor's.
    """

    def __init__(
        self,
        tensors: Sequence[ModelTensor],
        dtype: torch.dtype | str | None,
        keep_in_fp32_modules: Collection[str] | None,
    ) -> None:
        self._auto = dtype == "auto"
        self._dtype = None if dtype is None or self._auto else parse_dtype(dtype)
        if self._dtype is not None and not self._dtype.is_floating_point:
            raise ConfigError(
                f"`dtype={dtype}` is no floating-point dtype, and weights would lose their values in it. Give one such "
                f"as `torch.bfloat16`, or use `load_and_quantize_model` for integers."
            )
        self._kept = [f".{name}." for name in keep_in_fp32_modules or ()]
        named = [f".{name}." for each in tensors for name in each.names]
        for name, dotted in zip(keep_in_fp32_modules or (), self._kept, strict=True):
            if not any(dotted in each for each in named):
                parts = sorted({part for each in named for part in each.split(".") if part})
                raise ConfigError(
                    f"`keep_in_fp32_modules` names {name!r}, which is part of no tensor's name."
                    f"{did_you_mean(name, parts)} Give a module's name or a part of it between dots."
                )

    def of(self, each: ModelTensor, stored: Iterable[torch.dtype]) -> torch.dtype:
        """The dtype of one tensor, of which parts with dtypes `stored` are in the checkpoint."""
        ours = each.tensor.dtype
        if not ours.is_floating_point:
            return ours
        if any(kept in f".{name}." for name in each.names for kept in self._kept):
            return torch.float32
        if self._auto:
            found = set(stored)
            return found.pop() if len(found) == 1 else ours
        return ours if self._dtype is None else self._dtype
