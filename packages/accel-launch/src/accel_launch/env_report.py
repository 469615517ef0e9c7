"""The command `accel env`: what a report of a fault needs to say about where it happened."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accel_launch.host import REPLACED_VARIABLES, inspect_host
from accel_state.config import LaunchSettings, RunConfig, did_you_mean
from accel_state.env import RUN_CONFIG_VARIABLE, detect, snapshot
from accel_state.errors import ConfigError

__all__ = ["HELP", "describe_environment", "main"]

HELP = "Show versions, devices and launcher variables, to paste into a report."

_PACKAGES = (
    "accel",
    "accel-state",
    "accel-data",
    "accel-parallel",
    "accel-precision",
    "accel-bigmodel",
    "accel-track",
    "accel-launch",
    "torch",
    "numpy",
)
_VARIABLES = (*REPLACED_VARIABLES, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_PROCID")


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: what follows ``accel env``: nothing, or ``--help``.

    Raises:
        ConfigError: for any other word.
    """
    if list(argv) in (["-h"], ["--help"]):
        print(f"usage: accel env\n\n{HELP}\nNothing is sent anywhere. Exit code 0.")
        return 0
    if argv:
        raise ConfigError(
            f"`accel env {' '.join(argv)}`: the command takes no arguments.{did_you_mean(argv[0], ['--help'])} "
            f"Run `accel env`."
        )
    for heading, rows in describe_environment(snapshot()).items():
        print(heading)
        width = max(len(name) for name in rows)
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")
    return 0


def describe_environment(environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The report, by section. Imports torch where there is one, and says so where that fails."""
    return {
        "versions": _versions(),
        "machine": _machine(environ),
        "devices": _devices(),
        "launcher": _launcher(environ),
        "settings from the launcher": _settings(environ),
    }


def _versions() -> dict[str, str]:
    return {"python": f"{platform.python_version()} ({sys.executable})"} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine(environ: Mapping[str, str]) -> dict[str, str]:
    host = inspect_host(environ)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "CPU": f"{_cpu_name()}, {host.num_cores} core(s) usable of {os.cpu_count()}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "CUDA devices": f"{host.num_gpus} found without torch",
    }


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> dict[str, str]:
    try:
        from accel_state.device import DEVICES
    except (ImportError, OSError) as error:  # OSError: a library that torch links to is missing
        return {"torch": f"cannot be imported: {error}"}
    import torch

    rows = {}
    for name, kind in DEVICES.items():
        if not kind.is_available():
            continue
        names = {str(kind.call("get_device_name", index, default="")) for index in range(kind.count())} - {""}
        rows[name] = f"{kind.count()}" + (f": {', '.join(sorted(names))}" if names else "")
    rows["torch built for CUDA"] = str(torch.version.cuda or "no")
    rows["distributed"] = "yes" if torch.distributed.is_available() else "no"
    return rows


def _launcher(environ: Mapping[str, str]) -> dict[str, str]:
    rows = {name: environ[name] for name in _VARIABLES if name in environ}
    try:
        found = detect(environ)
    except ConfigError as error:
        return {"started by": f"not clear: {error}", **rows}
    return {"started by": f"{found.launcher.value}, rank {found.rank} of {found.world_size}", **rows}


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    try:
        given = LaunchSettings.from_json(environ.get(RUN_CONFIG_VARIABLE))
        config = RunConfig(**given.values, sources=given.sources)
    except ConfigError as error:
        return {RUN_CONFIG_VARIABLE: f"cannot be used: {error}"}
    names = [name for name in RunConfig.__dataclass_fields__ if name != "sources"]
    return {name: f"{getattr(config, name)!r} ({config.source(name)})" for name in names}
