"""The names that DeepSpeed 0.19 reads from a configuration; others are refused with the nearest of them.

Names at the top are listed here. Those inside a section come from DeepSpeed's own models of it where it can be
imported, and from the tables below where it has none. It alone checks the insides of ``autotuning``, ``pipeline``,
``data_efficiency``, ``checkpoint``, ``datastates_ckpt``, ``expert_parallel`` and ``optimizer.params``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, get_args

from accel_parallel.deepspeed.available import is_installed, require_deepspeed
from accel_parallel.deepspeed.settings import AUTO
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["check_names", "check_schedule", "check_sections"]

_SECTIONS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "compile", "csv_monitor", "data_efficiency", "data_types", "datastates_ckpt", "expert_parallel",
    "flops_profiler", "fp16", "hybrid_engine", "optimizer", "pipeline", "scheduler", "tensor_parallel", "tensorboard",
    "timers", "torch_autocast", "wandb", "weight_quantization", "zero_optimization",
})  # fmt: skip
_VALUES = frozenset({
    "communication_data_type", "data_parallel_size", "dataloader_drop_last", "disable_allgather", "disable_python_gc",
    "dump_state", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "managed_gradient_accumulation", "memory_breakdown",
    "prescale_gradients", "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print",
    "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
})  # fmt: skip
_REMOVED: Mapping[str, str] = {
    "amp": "Use `bf16`, `fp16` or `torch_autocast`.",
    "compression_training": "Take it out.",
    "curriculum_learning": "Order the data in your own sampler.",
    "eigenvalue": "Take it out.",
    "elasticity": "Take it out and set the batch size.",
    "graph_harvesting": "Take it out.",
    "nebula": "Take it out; `save_state` writes the checkpoints.",
    "progressive_layer_drop": "Take it out.",
    "quantize_training": "Take it out.",
    "sparse_attention": "Use an attention implementation of the model's.",
    "sparse_gradients": "Take it out.",
    "zero_optimization.cpu_offload": "Write `offload_optimizer: {device: cpu}`.",
    "zero_optimization.cpu_offload_param": "Write `offload_param: {device: cpu}`.",
    "zero_optimization.cpu_offload_use_pin_memory": "Write `pin_memory` inside `offload_optimizer` or `offload_param`.",
    "zero_optimization.mics_hierarchical_params_gather": "Take it out.",
    "zero_optimization.mics_shard_size": "Use `zero_hpz_partition_size`.",
    "zero_optimization.zeropp_loco_param": "Take it out.",
}
"""What older versions read, and the way on."""
_INSIDE: Mapping[str, frozenset[str]] = {
    "activation_checkpointing": frozenset({
        "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints", "partition_activations",
        "profile", "synchronize_checkpoint_boundary",
    }),
    "aio": frozenset({
        "block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds",
    }),
    "data_types": frozenset({"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"}),
    "flops_profiler": frozenset({
        "detailed", "enabled", "module_depth", "output_file", "profile_step", "recompute_fwd_factor", "top_modules",
    }),
    "optimizer": frozenset({"legacy_fusion", "params", "type"}),
    "scheduler": frozenset({"params", "type"}),
    "timers": frozenset({"throughput"}),
    "torch_autocast": frozenset({"dtype", "enabled", "lower_precision_safe_modules"}),
}  # fmt: skip
_MODELS: Mapping[str, tuple[str, str]] = {
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "comet": ("deepspeed.monitor.config", "CometConfig"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
    "compile": ("deepspeed.compile.config", "CompileConfig"),
    "csv_monitor": ("deepspeed.monitor.config", "CSVConfig"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "hybrid_engine": ("deepspeed.runtime.config", "HybridEngineConfig"),
    "tensor_parallel": ("deepspeed.runtime.tensor_parallel.config", "TPTrainingConfig"),
    "tensorboard": ("deepspeed.monitor.config", "TensorBoardConfig"),
    "timers.throughput": ("deepspeed.utils.config", "DeepSpeedThroughputTimerConfig"),
    "wandb": ("deepspeed.monitor.config", "WandbConfig"),
    "weight_quantization": ("deepspeed.inference.config", "WeightQuantConfig"),
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
}
"""Where DeepSpeed keeps its model of a section."""


def check_names(values: Mapping[str, Any], source: str) -> None:
    """Refuse what DeepSpeed does not read, by the names that are known without it.

    Raises:
        ConfigError: with the nearest name.
    """
    for key, remedy in _REMOVED.items():
        section, _, name = key.rpartition(".")
        held = values.get(section) if section else values
        if isinstance(held, Mapping) and name in held:
            raise ConfigError(f"`{key}` ({source}) is no longer read by DeepSpeed 0.19. {remedy}")
    _refuse_unknown(values, _SECTIONS | _VALUES, "", source)
    for name in _SECTIONS & values.keys():
        if not isinstance(values[name], Mapping):
            raise ConfigError(
                f"`{name}` is {values[name]!r} ({source}), and it is a section. Give a dict with settings in it, or "
                f"take it out."
            )
    for name, known in _INSIDE.items():
        _refuse_unknown(values.get(name, {}), known, f"{name}.", source)


def check_sections(values: Mapping[str, Any], source: str) -> None:
    """Refuse names and values inside sections that DeepSpeed's own models refuse. Nothing where it is not installed.

    Raises:
        ConfigError: with the nearest name, or with what is wrong about a value.
    """
    if not is_installed():
        return
    require_deepspeed()  # an older one has other models
    for key, (module, name) in _MODELS.items():
        outer, _, inner = key.rpartition(".")
        held = (values.get(outer) or {}).get(inner) if outer else values.get(inner)
        if isinstance(held, Mapping):
            model = getattr(import_module(module), name)
            _check_model(model, held, f"{key}.", source)
            _check_values(model, held, key, source)
    if values.get("scheduler"):
        check_schedule(values["scheduler"], source)


def check_schedule(section: Mapping[str, Any], source: str) -> None:
    """Refuse a schedule or parameters that DeepSpeed does not have. Nothing where it is not installed.

    Raises:
        ConfigError: with the nearest name.
    """
    if not is_installed():
        return
    from deepspeed.runtime import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
        lr_schedules,
    )

    name, known = str(section.get("type")), list(lr_schedules.VALID_LR_SCHEDULES)
    if name not in known:
        raise ConfigError(
            f"`scheduler.type` is {name!r} ({source}), and DeepSpeed has no schedule of that name."
            f"{did_you_mean(name, known)} Use one of {', '.join(known)}, or prepare a schedule of torch instead."
        )
    parameters = set(inspect.signature(getattr(lr_schedules, name)).parameters) - {"optimizer"}
    _refuse_unknown(section.get("params") or {}, parameters, "scheduler.params.", source)


def _check_model(model: Any, held: Mapping[str, Any], prefix: str, source: str) -> None:
    """Names, in the sections inside as well."""
    known: dict[str, Any] = {}
    for name, about in model.model_fields.items():
        known[name] = about
        if about.alias:
            known[about.alias] = about
    _refuse_unknown(held, known, prefix, source)
    for name, value in held.items():
        inner = _model_within(known[name].annotation)
        if inner is not None and isinstance(value, Mapping):
            _check_model(inner, value, f"{prefix}{name}.", source)


def _model_within(annotation: Any) -> Any:
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and hasattr(each, "model_fields"):
            return each
    return None


def _check_values(model: Any, held: Mapping[str, Any], key: str, source: str) -> None:
    try:
        model(**{name: value for name, value in held.items() if value != AUTO})
    except ValueError as error:  # pydantic's own is one, and tells which value
        told: list[Any] = getattr(error, "errors", list)()
        place = ".".join([key, *map(str, told[0]["loc"])]) if told else key
        value, why = (told[0]["input"], told[0]["msg"]) if told else (dict(held), str(error))
        raise ConfigError(
            f"`{place}` is {value!r} ({source}), which DeepSpeed does not take: {why}. Change it, or take it out for "
            f"DeepSpeed's default."
        ) from None


def _refuse_unknown(given: Iterable[str], known: Iterable[str], prefix: str, source: str) -> None:
    names = sorted(known)
    for name in given:
        if name not in names:
            near, listed = did_you_mean(str(name), names), f" It reads {', '.join(names)}."
            raise ConfigError(
                f"`{prefix}{name}` ({source}) is nothing that DeepSpeed reads{' there' if prefix else ''}."
                f"{near or listed} Correct the name, or take it out."
            )
