"""From what was given where to one frozen `RunConfig`: pure, one precedence, every value with its source.

A value given to the `Accelerator` wins over the launcher's flag, and that over the default. Nothing else is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel_state.config import LaunchSettings, RunConfig
from accel_state.process import Process, ProcessSettings
from accel_state.topology import MeshShape

__all__ = ["open_process", "resolve"]


def resolve(
    arguments: Mapping[str, Any], launch: LaunchSettings, *, sources: Mapping[str, str] | None = None
) -> RunConfig:
    """Merge the settings of a run.

    Args:
        arguments: settings by name as the script gave them; ``None`` means not given.
        launch: settings that the launcher passed on, and the flag that each came from.
        sources: of the arguments that the script gave in another place than as an argument.

    Raises:
        ConfigError: if a value cannot work, naming it and its source.
    """
    values = dict(launch.values)
    found = dict(launch.sources)
    elsewhere = sources or {}
    for name, value in arguments.items():
        if value is None:
            continue
        overruled = name in values and values[name] != value
        before = f", over {found.get(name, 'the launcher')}={values[name]!r}" if overruled else ""
        values[name], found[name] = value, f"{elsewhere.get(name, 'argument of Accelerator')}{before}"
    return RunConfig(**values, sources=found)


def open_process(config: RunConfig, mesh: MeshShape | None) -> Process:
    """Join the world as the settings say. Every rank must call this."""
    return Process.open(
        ProcessSettings(
            mesh=mesh,
            device=config.device,
            backend=config.backend,
            timeout_s=config.timeout_s,
            check_collectives=config.check_collectives,
        )
    )
