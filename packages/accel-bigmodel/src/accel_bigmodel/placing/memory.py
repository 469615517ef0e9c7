"""How much memory each place may give: read from the machine, or as the user states it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from accel_bigmodel.sizes import format_bytes
from accel_state.config import did_you_mean
from accel_state.device import DEVICES, available_kind
from accel_state.errors import ConfigError

__all__ = [
    "UNLIMITED", "DeviceMap", "describe_budgets", "get_max_memory", "is_store", "parse_size", "place_key",
    "shown_place",
]  # fmt: skip

DeviceMap: TypeAlias = dict[str, int | str | torch.device]
"""Names of modules, or of tensors, to where they lie: an index of the machine's accelerator, a name of a device,
``"cpu"`` (host memory) or ``"disk"``."""

UNLIMITED = 1 << 62
"""Bytes of a place that was given no limit, such as a disk."""

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_KEPT_FREE = 0.1
"""Part of a device's free memory that is left to its libraries and to fragments."""


def get_max_memory(max_memory: Mapping[int | str, int | str] | None = None) -> dict[int | str, int]:
    """Bytes that each place may give: accelerators in order of their index, then ``"cpu"``, then ``"disk"``.

    Args:
        max_memory: sizes by place, as integers or as text such as ``"20GiB"`` and ``"8GB"``; only these places are
            used, and what they are is not compared with this machine, so that maps for another can be planned.
            Default: nine tenths of the free memory of each accelerator here, and what this process may still take of
            the host's.

    Raises:
        ConfigError: for a place or a size that is none.
    """
    if max_memory is None:
        return _of_this_machine()
    if not isinstance(max_memory, Mapping):
        raise ConfigError(
            f"`max_memory={max_memory!r}` is no mapping from places to sizes. Give one such as "
            f"`{{0: '20GiB', 'cpu': '60GiB'}}`."
        )
    found: dict[int | str, int] = {}
    for key, size in max_memory.items():
        place = place_key(key, setting="max_memory")
        if place in found:
            raise ConfigError(
                f"`max_memory` names {shown_place(place)} twice, the second time as {key!r}. Leave one of the two."
            )
        found[place] = parse_size(size, setting=f"max_memory[{key!r}]")
    return {key: found[key] for key in sorted(found, key=_rank)}


def parse_size(size: int | str, *, setting: str = "size") -> int:
    """Bytes of a size such as ``"20GiB"`` (2^30), ``"8GB"`` (10^9) or ``8000``.

    Raises:
        ConfigError: if it is none. ``"8Gb"`` is none either, since it is bits to some and bytes to others.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    unit = found[2] if found else ""
    if found is None or unit.upper() not in _UNITS or (len(unit) > 1 and unit.endswith("b") and unit[0].isupper()):
        raise ConfigError(
            f"`{setting}={size!r}` is no size in bytes. Write a whole number of bytes, or a number with a unit: "
            f"'20GiB' (powers of 1024), '8GB' (powers of 1000)."
        )
    return int(float(found[1]) * _UNITS[unit.upper()])


def place_key(key: int | str | torch.device, *, setting: str) -> int | str:
    """What a place is called in plans: the index of an accelerator, ``"cpu"``, ``"disk"``, or a type such as ``"mps"``
    whose devices have no index.

    Raises:
        ConfigError: if it is no place.
    """
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    text = str(key) if isinstance(key, (str, torch.device)) else ""
    if text in ("cpu", "disk"):
        return text
    kind, _, index = text.partition(":")
    if kind in DEVICES and kind != "cpu" and (index == "" or index.isdecimal()):
        return int(index or 0) if DEVICES[kind].indexed else kind
    known = ["cpu", "disk", *DEVICES]
    raise ConfigError(
        f"`{setting}` names {key!r}, which is no place for weights.{did_you_mean(text, known) if text else ''} Use the "
        f"index of an accelerator (0, 1, ...), 'cpu' or 'disk'."
    )


def is_store(place: int | str) -> bool:
    """Whether weights are only kept there and brought to another place to compute."""
    return place in ("cpu", "disk")


def shown_place(place: int | str) -> str:
    """A place in a sentence."""
    return f"device {place}" if isinstance(place, int) else str(place)


def _rank(place: int | str) -> tuple[int, int, str]:
    if isinstance(place, int):
        return (0, place, "")
    return ({"cpu": 2, "disk": 3}.get(place, 1), 0, place)


def _of_this_machine() -> dict[int | str, int]:
    found: dict[int | str, int] = {}
    kind = available_kind()
    if kind.type != "cpu":
        for index in range(kind.count()):
            free = _free_bytes(kind.type, index)
            found[index if kind.indexed else kind.type] = int(free * (1 - _KEPT_FREE))
    found["cpu"] = _free_host_bytes()
    return found


def _free_bytes(device_type: str, index: int) -> int:
    kind = DEVICES[device_type]
    answer = kind.call("mem_get_info", index)
    if answer is not None:
        # What torch has reserved and does not use is free to this process as well.
        idle = kind.call("memory_reserved", index, default=0) - kind.call("memory_allocated", index, default=0)
        return int(answer[0]) + int(idle)
    if device_type == "mps":  # memory is the host's
        taken = int(kind.call("driver_allocated_memory", default=0))
        return int(kind.call("recommended_max_memory", default=0)) - taken
    properties = kind.call("get_device_properties", index)
    total = getattr(properties, "total_memory", None)
    if total is None:
        raise ConfigError(
            f"How much memory `{device_type}:{index}` has free cannot be asked of torch {torch.__version__}, and "
            f"`max_memory` was not given. Give it, such as `{{{index}: '20GiB', 'cpu': '60GiB'}}`."
        )
    return int(total) - int(kind.call("memory_allocated", index, default=0))


def _free_host_bytes() -> int:
    """What the host has available, or the control group of this process, whichever is less."""
    limits = [_host_available_bytes()]
    group = Path("/sys/fs/cgroup")
    limit, used = _number_in(group / "memory.max"), _number_in(group / "memory.current")
    if limit is not None and used is not None:
        cached = _entry_bytes(group / "memory.stat", "inactive_file")
        limits.append(max(limit - used + cached, 0))
    return min(limits)


def _host_available_bytes() -> int:
    available = _entry_bytes(Path("/proc/meminfo"), "MemAvailable:") * 1024
    if available:
        return available
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" in names:
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    raise ConfigError(
        "How much memory the host has cannot be read on this system, and `max_memory` was not given. Give it, such as "
        "`{'cpu': '60GiB'}`."
    )


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _entry_bytes(path: Path, name: str) -> int:
    """The number behind a name in one of the kernel's lists; 0 where there is none."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def describe_budgets(budgets: Mapping[int | str, int]) -> str:
    """All places with their sizes, as part of a sentence."""
    return ", ".join(
        f"{shown_place(place)}: {'no limit' if size >= UNLIMITED else format_bytes(size)}"
        for place, size in budgets.items()
    )
