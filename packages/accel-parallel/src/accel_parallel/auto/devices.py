"""What this process runs on, from the device itself, the operating system, and a table of public datasheets."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from accel_parallel.auto.hardware import Hardware, Link
from accel_parallel.auto.profile import DTypeName
from accel_state.errors import ConfigError
from accel_state.topology import Topology

if TYPE_CHECKING:
    import torch

    from accel_state.process import Process

__all__ = ["agreed_hardware", "detect_hardware", "host_memory_bytes"]


@dataclass(frozen=True, slots=True)
class _Row:
    """Figures of one device by its datasheet: dense operations, bandwidths in one direction."""

    name: str
    """Part of the name that the driver gives it."""
    bf16: float
    """1e12 operations a second, without sparsity. Devices without bfloat16: of float16."""
    fp32: float
    """The same in float32, without TF32, as torch multiplies by default."""
    memory: float
    """GB/s of the device's memory."""
    intra: float
    """GB/s from device to device in a node: NVLink, or PCIe where there is none."""
    inter: float
    """GB/s of network a device: one 400 Gb/s (200, 100) card for each, as in systems that the vendor sells."""
    host: float
    """GB/s of PCIe."""
    has_bf16: bool = True


# From the vendors' public datasheets (NVIDIA A100, H100, H200, B200, L4, L40S, A10, V100, T4, RTX 4090; AMD MI250X,
# MI300X). The first row whose name occurs is taken, so narrower names come first.
_TABLE = (
    _Row("B200", 2250, 75, 7700, 900, 50, 55),
    _Row("H200", 989, 67, 4800, 450, 50, 55),
    _Row("H100 PCIe", 756, 51, 2000, 55, 25, 55),
    _Row("H100 NVL", 835, 60, 3900, 300, 25, 55),
    _Row("GH200", 989, 67, 4000, 450, 50, 225),
    _Row("H100", 989, 67, 3350, 450, 50, 55),
    _Row("H800", 989, 67, 3350, 200, 50, 55),
    _Row("A100-SXM4-40GB", 312, 19.5, 1555, 300, 25, 27),
    _Row("A100-PCIE", 312, 19.5, 1555, 27, 12, 27),
    _Row("A100 80GB PCIe", 312, 19.5, 1935, 27, 12, 27),
    _Row("A100", 312, 19.5, 2039, 300, 25, 27),
    _Row("A800", 312, 19.5, 2039, 200, 25, 27),
    _Row("L40S", 362, 91.6, 864, 27, 12, 27),
    _Row("L40", 181, 90.5, 864, 27, 12, 27),
    _Row("L4", 121, 30.3, 300, 27, 6, 27),
    _Row("A10", 125, 31.2, 600, 27, 6, 27),
    _Row("V100", 125, 15.7, 900, 150, 12, 13, has_bf16=False),
    _Row("T4", 65, 8.1, 300, 13, 6, 13, has_bf16=False),
    _Row("RTX 4090", 165, 82.6, 1008, 27, 1.2, 27),
    _Row("RTX 3090", 71, 35.6, 936, 27, 1.2, 27),
    _Row("MI300X", 1307, 163, 5300, 64, 50, 55),
    _Row("MI250X", 383, 47.9, 3277, 50, 25, 30),
)
_UNKNOWN = _Row("", 100, 20, 900, 13, 1.2, 13)
"""For a device that the table does not name: an ordinary one without fast links."""

_CPU_FLOPS_PER_S = 16e9
"""A core: 8 float32 lanes at 2 GHz, no fused multiply-add counted. What training reaches is less than any datasheet."""


def detect_hardware(topology: Topology, device: torch.device | str) -> Hardware:
    """The hardware of this process, taken for that of all.

    Memory is what the device or the operating system says; speeds and links are those of datasheets, since measuring
    them would take longer than many a plan saves. Candidates are ranked by these, never admitted. Change what you know
    better with ``dataclasses.replace``. Ranks may find different amounts of memory: agree on the least before planning.

    Args:
        topology: how many processes share this node.
        device: the process's device, a CPU or one that ``torch.cuda`` knows.

    Raises:
        ConfigError: for another device.
    """
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return _cpu(topology)
    if device.type != "cuda":
        raise ConfigError(
            f"The memory and speed of a device of type {device.type!r} are not known here. Pass "
            f"`Hardware(name=..., memory_bytes=..., ...)` with its figures."
        )
    properties = torch.cuda.get_device_properties(device)
    return hardware_of(properties.name, memory_bytes=properties.total_memory, topology=topology)


def agreed_hardware(process: Process) -> Hardware:
    """Every rank must call this. That of this process, with the least memory and speed that any has.

    So all ranks choose the same plan.
    """
    from accel_state.collectives import gather_object  # which needs torch, as nothing else here does

    own = detect_hardware(process.topology, process.device)
    everybody = gather_object([own], process=process)
    return replace(
        own,
        memory_bytes=min(each.memory_bytes for each in everybody),
        host_memory_bytes=min(each.host_memory_bytes for each in everybody),
        flops_per_s=min((each.flops_per_s for each in everybody), key=lambda speeds: speeds["float32"]),
    )


def hardware_of(name: str, *, memory_bytes: int, topology: Topology) -> Hardware:
    """The hardware behind a device's name, by the table."""
    row = next((row for row in _TABLE if row.name.lower() in name.lower()), _UNKNOWN)
    assumed = ["speed and links of the datasheet, network cards of 8-device systems"]
    if row is _UNKNOWN:
        assumed = [f"{name!r} is in no table: speed and links of an ordinary device without fast links"]
    flops: dict[DTypeName, float] = {"float32": row.fp32 * 1e12, "float16": row.bf16 * 1e12}
    flops["bfloat16"] = flops["float16" if row.has_bf16 else "float32"]
    return Hardware(
        name=name,
        memory_bytes=memory_bytes,
        flops_per_s=flops,
        memory_bytes_per_s=row.memory * 1e9,
        devices_per_node=topology.local_world_size,
        intra_node=Link(bytes_per_s=row.intra * 1e9, latency_s=2e-6 if row.intra > 100 else 5e-6),
        inter_node=Link(bytes_per_s=row.inter * 1e9, latency_s=8e-6),
        host=Link(bytes_per_s=row.host * 1e9, latency_s=10e-6),
        host_memory_bytes=host_memory_bytes(),
        assumed=tuple(assumed),
    )


def _cpu(topology: Topology) -> Hardware:
    processes = topology.local_world_size
    cores = max(1.0, len(os.sched_getaffinity(0)) / processes) if hasattr(os, "sched_getaffinity") else 1.0
    return Hardware(
        name="CPU",
        memory_bytes=host_memory_bytes() // processes,
        flops_per_s={"float32": cores * _CPU_FLOPS_PER_S},
        memory_bytes_per_s=20e9 / processes,
        devices_per_node=processes,
        intra_node=Link(bytes_per_s=2e9, latency_s=50e-6),
        inter_node=Link(bytes_per_s=1e9, latency_s=100e-6),
        efficiency=0.8,
        steps_at_once=False,
        assumed=("speed of an ordinary core, gloo over shared memory and 10 Gb/s Ethernet",),
    )


def host_memory_bytes() -> int:
    """Memory of this host, or what the container that this process is in may use of it.

    Raises:
        ConfigError: if the operating system does not say.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        raise ConfigError(
            "The operating system does not say how much memory there is. Pass `Hardware(...)` with its figures."
        ) from None
    limits = [_limit(Path(path)) for path in _LIMITS]
    return min([total, *(limit for limit in limits if limit is not None)])


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use: control groups of version 2, and of version 1."""


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
