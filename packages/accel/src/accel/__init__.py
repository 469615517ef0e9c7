"""Run a raw PyTorch loop on any hardware and any kind of parallelism by changing five lines.

Everything that the packages offer to users has its name here too. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel._version import __version__

if TYPE_CHECKING:
    from accel.accelerator import Accelerator as Accelerator
    from accel.local_sgd import LocalSGD as LocalSGD
    from accel.project import ProjectConfiguration as ProjectConfiguration
    from accel_bigmodel import BnbQuantizationConfig as BnbQuantizationConfig
    from accel_bigmodel import DeviceSpeed as DeviceSpeed
    from accel_bigmodel import EstimateOptions as EstimateOptions
    from accel_bigmodel import Machine as Machine
    from accel_bigmodel import TorchaoQuantizationConfig as TorchaoQuantizationConfig
    from accel_bigmodel import Workload as Workload
    from accel_bigmodel import align_module_device as align_module_device
    from accel_bigmodel import check_device_map as check_device_map
    from accel_bigmodel import compute_module_sizes as compute_module_sizes
    from accel_bigmodel import cpu_offload as cpu_offload
    from accel_bigmodel import cpu_offload_with_hook as cpu_offload_with_hook
    from accel_bigmodel import disk_offload as disk_offload
    from accel_bigmodel import dispatch_model as dispatch_model
    from accel_bigmodel import estimate_memory as estimate_memory
    from accel_bigmodel import explain_device_map as explain_device_map
    from accel_bigmodel import find_tied_parameters as find_tied_parameters
    from accel_bigmodel import get_balanced_memory as get_balanced_memory
    from accel_bigmodel import get_max_memory as get_max_memory
    from accel_bigmodel import has_offloaded_params as has_offloaded_params
    from accel_bigmodel import infer_auto_device_map as infer_auto_device_map
    from accel_bigmodel import init_empty_weights as init_empty_weights
    from accel_bigmodel import init_on_device as init_on_device
    from accel_bigmodel import load_and_quantize_model as load_and_quantize_model
    from accel_bigmodel import load_checkpoint_and_dispatch as load_checkpoint_and_dispatch
    from accel_bigmodel import load_checkpoint_in_model as load_checkpoint_in_model
    from accel_bigmodel import print_sizes as print_sizes
    from accel_bigmodel import remove_hooks as remove_hooks
    from accel_bigmodel import retie_parameters as retie_parameters
    from accel_bigmodel import set_module_tensor_to_device as set_module_tensor_to_device
    from accel_bigmodel import total_size_bytes as total_size_bytes
    from accel_data import DataLoaderConfiguration as DataLoaderConfiguration
    from accel_data import skip_first_batches as skip_first_batches
    from accel_launch.notebook import debug_launcher as debug_launcher
    from accel_launch.notebook import notebook_launcher as notebook_launcher
    from accel_parallel import AutoParallelism as AutoParallelism
    from accel_parallel import DDPCommunicationHookType as DDPCommunicationHookType
    from accel_parallel import DeepSpeedPlugin as DeepSpeedPlugin
    from accel_parallel import DeepSpeedSequenceParallelConfig as DeepSpeedSequenceParallelConfig
    from accel_parallel import DistributedDataParallelKwargs as DistributedDataParallelKwargs
    from accel_parallel import DummyOptim as DummyOptim
    from accel_parallel import DummyScheduler as DummyScheduler
    from accel_parallel import FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin
    from accel_parallel import GradientAccumulationPlugin as GradientAccumulationPlugin
    from accel_parallel import HfDeepSpeedConfig as HfDeepSpeedConfig
    from accel_parallel import InitProcessGroupKwargs as InitProcessGroupKwargs
    from accel_parallel import ParallelismConfig as ParallelismConfig
    from accel_parallel import TorchContextParallelConfig as TorchContextParallelConfig
    from accel_parallel import TorchDynamoPlugin as TorchDynamoPlugin
    from accel_parallel import compile_regions as compile_regions
    from accel_parallel import has_compiled_regions as has_compiled_regions
    from accel_parallel import loss_parallel as loss_parallel
    from accel_parallel import prepare_pippy as prepare_pippy
    from accel_precision import AutocastKwargs as AutocastKwargs
    from accel_precision import GradScalerKwargs as GradScalerKwargs
    from accel_state.errors import AccelError as AccelError
    from accel_state.errors import CheckpointError as CheckpointError
    from accel_state.errors import CollectiveError as CollectiveError
    from accel_state.errors import ConfigError as ConfigError
    from accel_state.errors import MissingDependencyError as MissingDependencyError
    from accel_state.logging import get_logger as get_logger
    from accel_state.logging import tqdm as tqdm
    from accel_state.memory import find_executable_batch_size as find_executable_batch_size
    from accel_state.memory import release_memory as release_memory
    from accel_state.process import DistributedType as DistributedType
    from accel_state.process import Process as Process
    from accel_state.rng import set_seed as set_seed
    from accel_state.rng import synchronize_rng_states as synchronize_rng_states
    from accel_track import GeneralTracker as GeneralTracker

_HOME = {
    "Accelerator": "accel.accelerator",
    "LocalSGD": "accel.local_sgd",
    "ProjectConfiguration": "accel.project",
    "BnbQuantizationConfig": "accel_bigmodel",
    "DeviceSpeed": "accel_bigmodel",
    "EstimateOptions": "accel_bigmodel",
    "Machine": "accel_bigmodel",
    "TorchaoQuantizationConfig": "accel_bigmodel",
    "Workload": "accel_bigmodel",
    "align_module_device": "accel_bigmodel",
    "check_device_map": "accel_bigmodel",
    "compute_module_sizes": "accel_bigmodel",
    "cpu_offload": "accel_bigmodel",
    "cpu_offload_with_hook": "accel_bigmodel",
    "disk_offload": "accel_bigmodel",
    "dispatch_model": "accel_bigmodel",
    "estimate_memory": "accel_bigmodel",
    "explain_device_map": "accel_bigmodel",
    "find_tied_parameters": "accel_bigmodel",
    "get_balanced_memory": "accel_bigmodel",
    "get_max_memory": "accel_bigmodel",
    "has_offloaded_params": "accel_bigmodel",
    "infer_auto_device_map": "accel_bigmodel",
    "init_empty_weights": "accel_bigmodel",
    "init_on_device": "accel_bigmodel",
    "load_and_quantize_model": "accel_bigmodel",
    "load_checkpoint_and_dispatch": "accel_bigmodel",
    "load_checkpoint_in_model": "accel_bigmodel",
    "print_sizes": "accel_bigmodel",
    "remove_hooks": "accel_bigmodel",
    "retie_parameters": "accel_bigmodel",
    "set_module_tensor_to_device": "accel_bigmodel",
    "total_size_bytes": "accel_bigmodel",
    "DataLoaderConfiguration": "accel_data",
    "skip_first_batches": "accel_data",
    "debug_launcher": "accel_launch.notebook",
    "notebook_launcher": "accel_launch.notebook",
    "DDPCommunicationHookType": "accel_parallel",
    "DistributedDataParallelKwargs": "accel_parallel",
    "DeepSpeedPlugin": "accel_parallel",
    "DeepSpeedSequenceParallelConfig": "accel_parallel",
    "DummyOptim": "accel_parallel",
    "DummyScheduler": "accel_parallel",
    "HfDeepSpeedConfig": "accel_parallel",
    "GradientAccumulationPlugin": "accel_parallel",
    "InitProcessGroupKwargs": "accel_parallel",
    "FullyShardedDataParallelPlugin": "accel_parallel",
    "ParallelismConfig": "accel_parallel",
    "TorchContextParallelConfig": "accel_parallel",
    "TorchDynamoPlugin": "accel_parallel",
    "compile_regions": "accel_parallel",
    "has_compiled_regions": "accel_parallel",
    "loss_parallel": "accel_parallel",
    "AutoParallelism": "accel_parallel",
    "prepare_pippy": "accel_parallel",
    "AutocastKwargs": "accel_precision",
    "GradScalerKwargs": "accel_precision",
    "AccelError": "accel_state.errors",
    "CheckpointError": "accel_state.errors",
    "CollectiveError": "accel_state.errors",
    "ConfigError": "accel_state.errors",
    "MissingDependencyError": "accel_state.errors",
    "get_logger": "accel_state.logging",
    "tqdm": "accel_state.logging",
    "find_executable_batch_size": "accel_state.memory",
    "release_memory": "accel_state.memory",
    "DistributedType": "accel_state.process",
    "Process": "accel_state.process",
    "set_seed": "accel_state.rng",
    "synchronize_rng_states": "accel_state.rng",
    "GeneralTracker": "accel_track",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
