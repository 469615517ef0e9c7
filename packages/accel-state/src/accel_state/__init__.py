"""Who and where am I: environment, devices, topology, process group, collectives, RNG, logging, memory.

Names are imported when they are first used, so that a launcher may read `LaunchSettings` without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_state._version import __version__

if TYPE_CHECKING:
    from accel_state.config import LaunchSettings as LaunchSettings
    from accel_state.config import RunConfig as RunConfig
    from accel_state.device import DEVICES as DEVICES
    from accel_state.device import DeviceKind as DeviceKind
    from accel_state.env import ProcessEnvironment as ProcessEnvironment
    from accel_state.env import detect as detect
    from accel_state.errors import AccelError as AccelError
    from accel_state.errors import CheckpointError as CheckpointError
    from accel_state.errors import CollectiveError as CollectiveError
    from accel_state.errors import ConfigError as ConfigError
    from accel_state.errors import MissingDependencyError as MissingDependencyError
    from accel_state.process import DistributedType as DistributedType
    from accel_state.process import Process as Process
    from accel_state.process import ProcessSettings as ProcessSettings
    from accel_state.topology import MeshShape as MeshShape
    from accel_state.topology import Topology as Topology

_HOME = {
    "LaunchSettings": "config",
    "RunConfig": "config",
    "DEVICES": "device",
    "DeviceKind": "device",
    "ProcessEnvironment": "env",
    "detect": "env",
    "AccelError": "errors",
    "CheckpointError": "errors",
    "CollectiveError": "errors",
    "ConfigError": "errors",
    "MissingDependencyError": "errors",
    "DistributedType": "process",
    "Process": "process",
    "ProcessSettings": "process",
    "MeshShape": "topology",
    "Topology": "topology",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
