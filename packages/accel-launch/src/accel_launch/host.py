"""What this machine has, found without loading torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["REPLACED_VARIABLES", "Host", "count_gpus", "inspect_host", "visible_gpus"]

REPLACED_VARIABLES: tuple[str, ...] = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
    "ACCEL_RUN_CONFIG",
)
"""Variables by which a launcher places a process. A launch sets its own, and lets none from outside through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The machine that a launch is planned for. Any machine can be described, for tests and for planning elsewhere."""

    num_gpus: int = 0
    """CUDA devices that a process started here would see."""
    num_cores: int = 1
    """CPU cores that a process started here may use at once, rounded down to whole ones."""
    python: str = sys.executable
    """Interpreter that runs the script."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Those variables of the environment that a launch changes or looks at, as they are."""


def inspect_host(environ: Mapping[str, str], *, root: Path = Path("/")) -> Host:
    """Describe this machine.

    Args:
        environ: the environment that the launch inherits, from `accel_state.env.snapshot`.
        root: where the file system begins, for tests.
    """
    looked_at = (*REPLACED_VARIABLES, "OMP_NUM_THREADS")
    return Host(
        num_gpus=visible_gpus(count_gpus(root), environ.get("CUDA_VISIBLE_DEVICES")),
        num_cores=_count_cores(root),
        variables={name: environ[name] for name in looked_at if name in environ},
    )


def count_gpus(root: Path = Path("/")) -> int:
    """NVIDIA devices of this machine, or of this container: it has a device node for each one given to it.

    Where there are no nodes, the list that the driver keeps counts (it shows the whole machine).
    """
    nodes = root / "dev"
    try:
        found = sum(1 for name in os.listdir(nodes) if re.fullmatch(r"nvidia\d+", name))
    except OSError:
        found = 0
    driver = root / "proc/driver/nvidia/gpus"
    return found or (len(list(driver.iterdir())) if driver.is_dir() else 0)


def visible_gpus(present: int, setting: str | None) -> int:
    """How many of the devices ``CUDA_VISIBLE_DEVICES`` leaves visible. Pure.

    The CUDA programming guide: the list ends at the first entry that names no device; a device named
    twice, or a MIG slice together with anything else, makes the list void beyond one.
    """
    if setting is None:
        return present
    seen: list[str] = []
    for entry in (part.strip() for part in setting.split(",")):
        is_index = re.fullmatch(r"\d+", entry) is not None
        if not (is_index and int(entry) < present) and not entry.startswith(("GPU-", "MIG-")):
            break
        if entry in seen:
            return 0
        seen.append(entry)
    if any(entry.startswith("MIG-") for entry in seen):
        return min(1, present)
    return min(len(seen), present)


def _count_cores(root: Path) -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _quota(root) or cores)


def _quota(root: Path) -> int | None:
    """Cores that the control group grants (``cpu.max`` of cgroup v2: quota and period in µs), at least one."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
