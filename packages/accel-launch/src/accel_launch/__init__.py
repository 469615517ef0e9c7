"""The `accel` command, and the same launches from Python: from flags to running processes.

Names are imported when they are first used: nothing here loads torch, and `accel --help` loads next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_launch._version import __version__

if TYPE_CHECKING:
    from accel_launch.host import Host as Host
    from accel_launch.host import inspect_host as inspect_host
    from accel_launch.notebook import WorkerError as WorkerError
    from accel_launch.notebook import debug_launcher as debug_launcher
    from accel_launch.notebook import notebook_launcher as notebook_launcher
    from accel_launch.options import LaunchOptions as LaunchOptions
    from accel_launch.plan import LaunchPlan as LaunchPlan
    from accel_launch.plan import ProcessPlan as ProcessPlan
    from accel_launch.plan import Setting as Setting
    from accel_launch.plan import plan_launch as plan_launch

_HOME = {
    "Host": "host",
    "inspect_host": "host",
    "WorkerError": "notebook",
    "debug_launcher": "notebook",
    "notebook_launcher": "notebook",
    "LaunchOptions": "options",
    "LaunchPlan": "plan",
    "ProcessPlan": "plan",
    "Setting": "plan",
    "plan_launch": "plan",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
