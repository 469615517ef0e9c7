"""Which strategy a run takes: pure choice by name and world, and the registry that names resolve in."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError
from accel_state.topology import MeshShape

__all__ = ["BUILT_IN", "select_strategy", "strategy_class"]

BUILT_IN: dict[str, str] = {
    "single": "accel_parallel.single:SingleStrategy",
    "ddp": "accel_parallel.ddp:DDPStrategy",
    "fsdp": "accel_parallel.fsdp.strategy:FSDPStrategy",
    "deepspeed": "accel_parallel.deepspeed.strategy:DeepSpeedStrategy",
}
"""Strategies of this package, as ``module:class``. Others join by the entry-point group ``accel.strategies``."""


def select_strategy(
    *, world_size: int, mesh: MeshShape | None = None, fsdp: bool = False, deepspeed: bool = False
) -> str:
    """Name of the strategy for a world, when none is asked for by name. Pure.

    Args:
        world_size: number of processes.
        mesh: how the world is divided; copies of the model alone are DDP's, everything else is FSDP's.
        fsdp: whether options of FSDP were given.
        deepspeed: whether options of DeepSpeed were.
    """
    if deepspeed:
        return "deepspeed"
    if fsdp or (mesh is not None and mesh.dp_replicate != world_size):
        return "fsdp"
    return "single" if world_size == 1 else "ddp"


def strategy_class(name: str) -> Any:
    """The class behind a name: called with the open `Process` and keyword options, it gives a `Strategy`.

    Raises:
        ConfigError: if no installed package provides the name.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    provided = {point.name: point for point in entry_points(group="accel.strategies")}
    if name not in provided:
        known = sorted({*BUILT_IN, *provided})
        raise ConfigError(
            f"`strategy={name!r}` is not provided by any installed package.{did_you_mean(name, known)} "
            f"Use one of {', '.join(known)}, or install the package that provides it."
        )
    return provided[name].load()
