"""From what was given where to one frozen `RunConfig`: pure, one precedence, every value with its source.

A value given to the `Accelerator` wins over the launcher's flag, and that over the default. Nothing else is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel_state.config import LaunchSettings, RunConfig

__all__ = ["resolve"]


def resolve(arguments: Mapping[str, Any], launch: LaunchSettings) -> RunConfig:
    """Merge the settings of a run.

    Args:
        arguments: settings by name as the script gave them; ``None`` means not given.
        launch: settings that the launcher passed on, and the flag that each came from.

    Raises:
        ConfigError: if a value cannot work, naming it and its source.
    """
    values = dict(launch.values)
    sources = dict(launch.sources)
    for name, value in arguments.items():
        if value is None:
            continue
        overruled = name in values and values[name] != value
        before = f", over {sources.get(name, 'the launcher')}={values[name]!r}" if overruled else ""
        values[name], sources[name] = value, f"argument of Accelerator{before}"
    return RunConfig(**values, sources=sources)
