"""What users may rely on: the names, the members, and what importing costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import accel

NAMES = [
    "AccelError",
    "Accelerator",
    "AutoParallelism",
    "AutocastKwargs",
    "BnbQuantizationConfig",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DeepSpeedSequenceParallelConfig",
    "DeviceSpeed",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DummyOptim",
    "DummyScheduler",
    "EstimateOptions",
    "FullyShardedDataParallelPlugin",
    "GeneralTracker",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "HfDeepSpeedConfig",
    "InitProcessGroupKwargs",
    "LocalSGD",
    "Machine",
    "MissingDependencyError",
    "ParallelismConfig",
    "Process",
    "ProjectConfiguration",
    "TorchContextParallelConfig",
    "TorchDynamoPlugin",
    "TorchaoQuantizationConfig",
    "Workload",
    "__version__",
    "align_module_device",
    "check_device_map",
    "compile_regions",
    "compute_module_sizes",
    "cpu_offload",
    "cpu_offload_with_hook",
    "debug_launcher",
    "disk_offload",
    "dispatch_model",
    "estimate_memory",
    "explain_device_map",
    "find_executable_batch_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_logger",
    "get_max_memory",
    "has_compiled_regions",
    "has_offloaded_params",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_and_quantize_model",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "loss_parallel",
    "notebook_launcher",
    "prepare_pippy",
    "print_sizes",
    "release_memory",
    "remove_hooks",
    "retie_parameters",
    "set_module_tensor_to_device",
    "set_seed",
    "skip_first_batches",
    "synchronize_rng_states",
    "total_size_bytes",
    "tqdm",
]
MEMBERS = [
    "stop_requested",
    "catch_stop_signals",
    "accumulate",
    "autocast",
    "backward",
    "broadcast",
    "check_trigger",
    "clear",
    "clip_grad_norm_",
    "clip_grad_value_",
    "context_parallel_rank",
    "data_parallel_rank",
    "device",
    "distributed_type",
    "end_training",
    "explain",
    "free_memory",
    "gather",
    "gather_for_metrics",
    "gather_object",
    "get_state_dict",
    "get_tracker",
    "gradient_accumulation_steps",
    "init_trackers",
    "is_last_process",
    "is_local_main_process",
    "is_main_process",
    "join_uneven_inputs",
    "load_state",
    "local_main_process_first",
    "local_process_index",
    "log",
    "lomo_backward",
    "main_process_first",
    "maybe_context_parallel",
    "mixed_precision",
    "no_sync",
    "num_processes",
    "on_last_process",
    "on_local_main_process",
    "on_local_process",
    "on_main_process",
    "on_process",
    "optimizer_step_was_skipped",
    "pad_across_processes",
    "prepare",
    "prepare_data_loader",
    "prepare_model",
    "prepare_optimizer",
    "prepare_scheduler",
    "print",
    "process_index",
    "project_dir",
    "reduce",
    "register_for_checkpointing",
    "register_load_state_pre_hook",
    "register_save_state_pre_hook",
    "save",
    "save_model",
    "save_state",
    "sequence_parallel_rank",
    "set_trigger",
    "shard_sequence",
    "split_between_processes",
    "state",
    "strategy",
    "sync_gradients",
    "tensor_parallel_rank",
    "torch_device_mesh",
    "trigger_sync_in_backward",
    "unshard_sequence",
    "unwrap_model",
    "use_distributed",
    "wait_for_everyone",
]
SOURCE = Path(accel.__file__).parent


def public(kind: type) -> dict[str, object]:
    """The public members of a class, those of its bases too."""
    return {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}


def test_the_public_names_are_these() -> None:
    assert sorted(accel.__all__) == sorted(dir(accel)) == NAMES
    assert all(getattr(accel, name) is not None for name in NAMES)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'accel' has no attribute 'Accelerate'"):
        accel.Accelerate  # noqa: B018


def test_the_members_of_the_accelerator_are_these() -> None:
    assert sorted(public(accel.Accelerator)) == sorted(MEMBERS)


def test_every_member_is_typed_and_documented() -> None:
    for name, member in public(accel.Accelerator).items():
        function = member.fget if isinstance(member, property) else member
        assert function.__doc__, name  # type: ignore[union-attr]
        hints = typing.get_type_hints(function)
        assert "return" in hints, name
        for parameter in list(inspect.signature(function).parameters.values())[1:]:  # type: ignore[arg-type]
            assert parameter.name in hints, (name, parameter.name)


def test_types_are_shipped_and_the_class_stays_small() -> None:
    assert (SOURCE / "py.typed").is_file()
    assert len((SOURCE / "accelerator.py").read_text().splitlines()) < 600


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, accel; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
