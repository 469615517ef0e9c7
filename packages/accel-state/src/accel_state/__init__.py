"""Who and where am I: environment, devices, topology, process group, collectives, RNG, logging, memory.

Names are imported when they are first used, so that a launcher may read `LaunchSettings` without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_state._version import __version__

if TYPE_CHECKING:
    from accel_state.blocks import find_blocks as find_blocks
    from accel_state.collectives import Reduction as Reduction
    from accel_state.collectives import broadcast as broadcast
    from accel_state.collectives import broadcast_object_list as broadcast_object_list
    from accel_state.collectives import gather as gather
    from accel_state.collectives import gather_object as gather_object
    from accel_state.collectives import gather_ragged as gather_ragged
    from accel_state.collectives import pad_across_processes as pad_across_processes
    from accel_state.collectives import reduce as reduce
    from accel_state.config import LaunchSettings as LaunchSettings
    from accel_state.config import RunConfig as RunConfig
    from accel_state.device import DEVICES as DEVICES
    from accel_state.device import DeviceKind as DeviceKind
    from accel_state.dtypes import DTYPE_OF_PRECISION as DTYPE_OF_PRECISION
    from accel_state.dtypes import DTypePolicy as DTypePolicy
    from accel_state.dtypes import dtype_size_bytes as dtype_size_bytes
    from accel_state.dtypes import parse_dtype as parse_dtype
    from accel_state.env import ProcessEnvironment as ProcessEnvironment
    from accel_state.env import detect as detect
    from accel_state.errors import AccelError as AccelError
    from accel_state.errors import BatchSizeError as BatchSizeError
    from accel_state.errors import CheckpointError as CheckpointError
    from accel_state.errors import CollectiveError as CollectiveError
    from accel_state.errors import ConfigError as ConfigError
    from accel_state.errors import MissingDependencyError as MissingDependencyError
    from accel_state.execution import local_main_process_first as local_main_process_first
    from accel_state.execution import main_process_first as main_process_first
    from accel_state.execution import on_last_process as on_last_process
    from accel_state.execution import on_local_main_process as on_local_main_process
    from accel_state.execution import on_local_process as on_local_process
    from accel_state.execution import on_main_process as on_main_process
    from accel_state.execution import on_process as on_process
    from accel_state.execution import print_main as print_main
    from accel_state.execution import split_between_processes as split_between_processes
    from accel_state.logging import RankLogger as RankLogger
    from accel_state.logging import get_logger as get_logger
    from accel_state.logging import tqdm as tqdm
    from accel_state.memory import clear_device_cache as clear_device_cache
    from accel_state.memory import find_executable_batch_size as find_executable_batch_size
    from accel_state.memory import is_out_of_memory as is_out_of_memory
    from accel_state.memory import release_memory as release_memory
    from accel_state.process import DistributedType as DistributedType
    from accel_state.process import Process as Process
    from accel_state.process import ProcessSettings as ProcessSettings
    from accel_state.rng import rng_state as rng_state
    from accel_state.rng import set_rng_state as set_rng_state
    from accel_state.rng import set_seed as set_seed
    from accel_state.rng import synchronize_rng_states as synchronize_rng_states
    from accel_state.topology import MeshShape as MeshShape
    from accel_state.topology import Topology as Topology
    from accel_state.tree import concatenate as concatenate
    from accel_state.tree import convert_to_fp32 as convert_to_fp32
    from accel_state.tree import find_batch_size as find_batch_size
    from accel_state.tree import find_device as find_device
    from accel_state.tree import map_tensors as map_tensors
    from accel_state.tree import send_to_device as send_to_device
    from accel_state.tree import slice_tensors as slice_tensors
    from accel_state.tree import tensor_leaves as tensor_leaves
    from accel_state.tree import tree_signature as tree_signature

_HOME = {
    "find_blocks": "blocks",
    "Reduction": "collectives",
    "broadcast": "collectives",
    "broadcast_object_list": "collectives",
    "gather": "collectives",
    "gather_object": "collectives",
    "gather_ragged": "collectives",
    "pad_across_processes": "collectives",
    "reduce": "collectives",
    "LaunchSettings": "config",
    "RunConfig": "config",
    "DEVICES": "device",
    "DeviceKind": "device",
    "DTYPE_OF_PRECISION": "dtypes",
    "DTypePolicy": "dtypes",
    "dtype_size_bytes": "dtypes",
    "parse_dtype": "dtypes",
    "ProcessEnvironment": "env",
    "detect": "env",
    "AccelError": "errors",
    "BatchSizeError": "errors",
    "CheckpointError": "errors",
    "CollectiveError": "errors",
    "ConfigError": "errors",
    "MissingDependencyError": "errors",
    "local_main_process_first": "execution",
    "main_process_first": "execution",
    "on_last_process": "execution",
    "on_local_main_process": "execution",
    "on_local_process": "execution",
    "on_main_process": "execution",
    "on_process": "execution",
    "print_main": "execution",
    "split_between_processes": "execution",
    "RankLogger": "logging",
    "get_logger": "logging",
    "tqdm": "logging",
    "clear_device_cache": "memory",
    "find_executable_batch_size": "memory",
    "is_out_of_memory": "memory",
    "release_memory": "memory",
    "DistributedType": "process",
    "Process": "process",
    "ProcessSettings": "process",
    "rng_state": "rng",
    "set_rng_state": "rng",
    "set_seed": "rng",
    "synchronize_rng_states": "rng",
    "MeshShape": "topology",
    "Topology": "topology",
    "concatenate": "tree",
    "convert_to_fp32": "tree",
    "find_batch_size": "tree",
    "find_device": "tree",
    "map_tensors": "tree",
    "send_to_device": "tree",
    "slice_tensors": "tree",
    "tensor_leaves": "tree",
    "tree_signature": "tree",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
