"""Options that users hand over in one list, ``kwargs_handlers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accel_parallel.plugins import DistributedDataParallelKwargs, InitProcessGroupKwargs
from accel_precision.settings import AutocastKwargs, GradScalerKwargs
from accel_state.errors import ConfigError

__all__ = ["KwargsHandler", "by_type"]

KwargsHandler = DistributedDataParallelKwargs | InitProcessGroupKwargs | GradScalerKwargs | AutocastKwargs


def by_type(handlers: Sequence[KwargsHandler]) -> dict[type, Any]:
    """Each of them by its class.

    Raises:
        ConfigError: for an unknown one, and for two of a kind.
    """
    found: dict[type, Any] = {}
    known = (DistributedDataParallelKwargs, InitProcessGroupKwargs, GradScalerKwargs, AutocastKwargs)
    for handler in handlers:
        if not isinstance(handler, known):
            raise ConfigError(
                f"`kwargs_handlers` holds a {type(handler).__name__}, which sets nothing known here. "
                f"Use {', '.join(kind.__name__ for kind in known)}."
            )
        if type(handler) in found:
            raise ConfigError(
                f"`kwargs_handlers` holds {type(handler).__name__} twice, and which one counts is not clear. Give one."
            )
        found[type(handler)] = handler
    return found
