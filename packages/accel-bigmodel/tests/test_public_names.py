"""The public names of the package, and that importing it stays light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import accel_bigmodel


def test_public_names() -> None:
    assert sorted(accel_bigmodel.__all__) == [
        "AllocationTracker",
        "BnbQuantizationConfig",
        "DeviceMap",
        "DeviceSpeed",
        "EstimateOptions",
        "Explanation",
        "LoadedCheckpoint",
        "Machine",
        "MemoryEstimate",
        "ModelDescription",
        "Plan",
        "ReadSettings",
        "StoredTensor",
        "TorchaoQuantizationConfig",
        "UserCpuOffloadHook",
        "Workload",
        "__version__",
        "align_module_device",
        "calculate_maximum_sizes",
        "check_device_map",
        "compute_module_sizes",
        "cpu_offload",
        "cpu_offload_with_hook",
        "describe_model",
        "disk_offload",
        "dispatch_model",
        "estimate_memory",
        "explain_device_map",
        "find_tied_parameters",
        "format_bytes",
        "get_balanced_memory",
        "get_max_memory",
        "has_offloaded_params",
        "infer_auto_device_map",
        "init_empty_weights",
        "init_on_device",
        "kv_cache_bytes_per_layer",
        "load_and_quantize_model",
        "load_checkpoint_and_dispatch",
        "load_checkpoint_in_model",
        "named_module_tensors",
        "plan_model",
        "print_sizes",
        "read_index",
        "remove_hooks",
        "retie_parameters",
        "set_module_tensor_to_device",
        "size_table",
        "total_size_bytes",
    ]
    assert set(dir(accel_bigmodel)) == set(accel_bigmodel.__all__)
    for name in accel_bigmodel.__all__:
        assert getattr(accel_bigmodel, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'accel_bigmodel' has no attribute 'loads'"):
        accel_bigmodel.loads  # noqa: B018


def test_importing_does_not_load_torch() -> None:
    code = "import sys, accel_bigmodel; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_of_the_readme_runs() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
