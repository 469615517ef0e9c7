"""Random number generators: seeding, their state as plain values, and one state over all ranks."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch

from accel_state.collectives import broadcast_object_list
from accel_state.device import DEVICES, DeviceKind, available_kind
from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["RngKind", "rng_state", "set_rng_state", "set_seed", "synchronize_rng_states"]

RngKind = Literal["torch", "device", "python", "numpy", "generator"]
"""``torch``: the CPU generator of torch; ``device``: that of the process's device; ``generator``: a given one."""

_SEEDS = 2**32
"""numpy's legacy generator takes seeds below this."""


def set_seed(seed: int, *, device_specific: bool = False, deterministic: bool = False) -> int:
    """Seed Python's ``random``, numpy and torch, on the CPU and on every device present; returns the seed used.

    Args:
        seed: from 0 to 2**32 - 1.
        device_specific: add the rank, so that each process draws other numbers. Those that share matrices along ``tp``,
            whose neighbours they are, draw alike: they compute copies of the same activations.
        deterministic: also make torch use deterministic algorithms only, and raise where an operation has none.
            CUDA further asks for the variable ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` and says so itself.

    Raises:
        ConfigError: if `seed` is outside its range.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _SEEDS:
        raise ConfigError(
            f"`seed={seed!r}` is not a whole number from 0 to {_SEEDS - 1}, which is what numpy takes. "
            f"Give one of those, for example `seed % 2**32`."
        )
    if device_specific and Process.is_open():
        topology = Process.current().topology
        seed = (seed + topology.rank // topology.shape.tp) % _SEEDS
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for kind in _present_devices():
        kind.call(kind.seed_function, seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return seed


def rng_state(kind: DeviceKind | None = None) -> dict[str, Any]:
    """The state of all generators of this process: JSON values and uint8 CPU tensors, to be stored without pickle.

    Args:
        kind: device type whose current device's generator to include; by default that of the open process,
            else the machine's. The CPU's is always there.
    """
    kind = kind or _current_kind()
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": _to_lists(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "device": {"type": kind.type, "state": kind.call("get_rng_state")},
    }


def set_rng_state(state: dict[str, Any], *, strict_device: bool = True) -> None:
    """Put all generators back to where `rng_state` found them. Round trips are exact.

    Args:
        state: what `rng_state` gave.
        strict_device: ``False`` leaves the device's generator alone where the state is another device type's.

    Raises:
        ConfigError: if parts are missing, or the state is another device type's.
    """
    missing = sorted({"python", "numpy", "torch", "device"} - set(state))
    if missing:
        raise ConfigError(
            f"The generator state lacks {', '.join(missing)}, so not every generator could be put back. "
            f"Give what `rng_state` returned, unchanged."
        )
    kind = _current_kind()
    device = state["device"]
    same = device["type"] == kind.type or device["state"] is None
    if strict_device and not same:
        raise ConfigError(
            f"The generator state was taken on `{device['type']}`, and this process computes on `{kind.type}`, whose "
            f"generator it does not fit. Resume on `{device['type']}`, or pass `strict_device=False` to go on with "
            f"a generator that does not continue."
        )
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if same and device["state"] is not None:
        kind.call("set_rng_state", device["state"])


def synchronize_rng_states(
    kinds: Iterable[RngKind], generator: torch.Generator | None = None, *, process: Process | None = None
) -> None:
    """Every rank must call this. Puts generators of all ranks to the state that rank 0 has.

    Args:
        kinds: which ones. ``device`` is the same as nothing where the process computes on the CPU.
        generator: the one that ``generator`` means.
        process: the world; by default the open one.

    Raises:
        ConfigError: if a kind is unknown, or ``generator`` is asked for without one.
    """
    wanted = list(kinds)
    for name in wanted:
        if name not in get_args(RngKind):
            raise ConfigError(
                f"{name!r} is no kind of generator that can be synchronised. "
                f"Use some of {', '.join(get_args(RngKind))}."
            )
    full = rng_state()
    mine: dict[str, Any] = {name: full[name] for name in wanted if name != "generator"}
    if "generator" in wanted:
        if generator is None:
            raise ConfigError(
                "`generator` is among the kinds to synchronise, but no generator was given. "
                "Pass `generator=`, or leave that kind out."
            )
        mine["generator"] = generator.get_state()
    theirs = broadcast_object_list([mine], process=process)[0]
    if generator is not None and "generator" in theirs:
        generator.set_state(theirs.pop("generator"))
    set_rng_state({**full, **theirs})


def _current_kind() -> DeviceKind:
    return Process.current().kind if Process.is_open() else available_kind()


def _present_devices() -> list[DeviceKind]:
    """Device types usable now. A plugin that nobody has imported is not loaded for this: nothing draws from it yet."""
    return [
        kind
        for kind in DEVICES.values()
        if kind.type != "cpu" and (kind.plugin is None or kind.plugin in sys.modules) and kind.is_available()
    ]


def _to_lists(value: Any) -> Any:
    """numpy arrays and scalars as lists and numbers, at any depth."""
    if isinstance(value, dict):
        return {key: _to_lists(each) for key, each in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
