"""Models larger than the memory at hand: device maps, loading, offload, estimates, quantized weights.

Names are imported when they are first used, so that importing the package does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_bigmodel._version import __version__

if TYPE_CHECKING:
    from accel_bigmodel.dispatch import dispatch_model as dispatch_model
    from accel_bigmodel.estimate.options import EstimateOptions as EstimateOptions
    from accel_bigmodel.estimate.predict import estimate_memory as estimate_memory
    from accel_bigmodel.estimate.result import MemoryEstimate as MemoryEstimate
    from accel_bigmodel.estimate.tracker import AllocationTracker as AllocationTracker
    from accel_bigmodel.init import init_empty_weights as init_empty_weights
    from accel_bigmodel.init import init_on_device as init_on_device
    from accel_bigmodel.kv_cache import kv_cache_bytes_per_layer as kv_cache_bytes_per_layer
    from accel_bigmodel.loading import LoadedCheckpoint as LoadedCheckpoint
    from accel_bigmodel.loading import ReadSettings as ReadSettings
    from accel_bigmodel.loading import load_checkpoint_and_dispatch as load_checkpoint_and_dispatch
    from accel_bigmodel.loading import load_checkpoint_in_model as load_checkpoint_in_model
    from accel_bigmodel.model_source import ModelDescription as ModelDescription
    from accel_bigmodel.model_source import describe_model as describe_model
    from accel_bigmodel.offload.access import align_module_device as align_module_device
    from accel_bigmodel.offload.access import set_module_tensor_to_device as set_module_tensor_to_device
    from accel_bigmodel.offload.handover import UserCpuOffloadHook as UserCpuOffloadHook
    from accel_bigmodel.offload.handover import cpu_offload_with_hook as cpu_offload_with_hook
    from accel_bigmodel.offload.offloading import cpu_offload as cpu_offload
    from accel_bigmodel.offload.offloading import disk_offload as disk_offload
    from accel_bigmodel.offload.offloading import has_offloaded_params as has_offloaded_params
    from accel_bigmodel.offload.offloading import remove_hooks as remove_hooks
    from accel_bigmodel.placing import DeviceMap as DeviceMap
    from accel_bigmodel.placing import DeviceSpeed as DeviceSpeed
    from accel_bigmodel.placing import Explanation as Explanation
    from accel_bigmodel.placing import Machine as Machine
    from accel_bigmodel.placing import Plan as Plan
    from accel_bigmodel.placing import Workload as Workload
    from accel_bigmodel.placing import check_device_map as check_device_map
    from accel_bigmodel.placing import explain_device_map as explain_device_map
    from accel_bigmodel.placing import get_balanced_memory as get_balanced_memory
    from accel_bigmodel.placing import get_max_memory as get_max_memory
    from accel_bigmodel.placing import infer_auto_device_map as infer_auto_device_map
    from accel_bigmodel.placing import plan_model as plan_model
    from accel_bigmodel.quantize.load import load_and_quantize_model as load_and_quantize_model
    from accel_bigmodel.quantize.options import BnbQuantizationConfig as BnbQuantizationConfig
    from accel_bigmodel.quantize.options import TorchaoQuantizationConfig as TorchaoQuantizationConfig
    from accel_bigmodel.sizes import calculate_maximum_sizes as calculate_maximum_sizes
    from accel_bigmodel.sizes import compute_module_sizes as compute_module_sizes
    from accel_bigmodel.sizes import format_bytes as format_bytes
    from accel_bigmodel.sizes import named_module_tensors as named_module_tensors
    from accel_bigmodel.sizes import print_sizes as print_sizes
    from accel_bigmodel.sizes import size_table as size_table
    from accel_bigmodel.sizes import total_size_bytes as total_size_bytes
    from accel_bigmodel.stored import StoredTensor as StoredTensor
    from accel_bigmodel.stored import read_index as read_index
    from accel_bigmodel.tied import find_tied_parameters as find_tied_parameters
    from accel_bigmodel.tied import retie_parameters as retie_parameters

_HOME = {
    "AllocationTracker": "estimate.tracker",
    "BnbQuantizationConfig": "quantize.options",
    "DeviceMap": "placing",
    "DeviceSpeed": "placing",
    "EstimateOptions": "estimate.options",
    "Explanation": "placing",
    "LoadedCheckpoint": "loading",
    "Machine": "placing",
    "MemoryEstimate": "estimate.result",
    "ModelDescription": "model_source",
    "Plan": "placing",
    "ReadSettings": "loading",
    "StoredTensor": "stored",
    "TorchaoQuantizationConfig": "quantize.options",
    "UserCpuOffloadHook": "offload.handover",
    "Workload": "placing",
    "align_module_device": "offload.access",
    "calculate_maximum_sizes": "sizes",
    "check_device_map": "placing",
    "compute_module_sizes": "sizes",
    "cpu_offload": "offload.offloading",
    "cpu_offload_with_hook": "offload.handover",
    "describe_model": "model_source",
    "disk_offload": "offload.offloading",
    "dispatch_model": "dispatch",
    "estimate_memory": "estimate.predict",
    "explain_device_map": "placing",
    "find_tied_parameters": "tied",
    "format_bytes": "sizes",
    "get_balanced_memory": "placing",
    "get_max_memory": "placing",
    "has_offloaded_params": "offload.offloading",
    "infer_auto_device_map": "placing",
    "init_empty_weights": "init",
    "init_on_device": "init",
    "kv_cache_bytes_per_layer": "kv_cache",
    "load_and_quantize_model": "quantize.load",
    "load_checkpoint_and_dispatch": "loading",
    "load_checkpoint_in_model": "loading",
    "named_module_tensors": "sizes",
    "plan_model": "placing",
    "print_sizes": "sizes",
    "read_index": "stored",
    "remove_hooks": "offload.offloading",
    "retie_parameters": "tied",
    "set_module_tensor_to_device": "offload.access",
    "size_table": "sizes",
    "total_size_bytes": "sizes",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
