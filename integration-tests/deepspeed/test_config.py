"""Completed configurations are ones that DeepSpeed itself takes, and what it would not is refused before."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from accel_parallel.deepspeed import available, keys
from accel_parallel.deepspeed.config import CompletedConfig, DeepSpeedConfig, Facts
from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_state.errors import ConfigError
from accel_state.testing import run_ranks

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed lives in an environment of its own")
runtime = pytest.importorskip("deepspeed.runtime.config")

MODEL = nn.Linear(4, 4)
OPEN: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": "auto", "loss_scale_window": "auto", "hysteresis": "auto"},
    "zero_optimization": {
        "overlap_comm": "auto",
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
"""As such files are commonly written."""


def complete(given: dict[str, Any] | None, facts: Facts, **arguments: Any) -> CompletedConfig:
    return DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=given, **arguments)).complete(facts)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), *((stage, to) for stage in (1, 2, 3) for to in ("none", "cpu", "nvme"))]
)
def test_deepspeed_takes_what_was_completed(stage: Any, offload: Any, precision: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"zero_stage": stage, "offload_optimizer_device": offload}
    if offload == "nvme":
        arguments["offload_optimizer_nvme_path"] = tmp_path
    if stage == 3 and offload != "none":
        arguments |= {"offload_param_device": "cpu", "transformer_moe_cls_names": "Linear"}
    shared: dict[str, Any] = {"micro_batch_size": 4, "num_steps": 2, "precision": precision, "hidden_size": 64}
    dummy = DummyOptim(MODEL.parameters(), lr=1e-4)
    for given, facts in (
        (None, Facts(optimizer=torch.optim.SGD(MODEL.parameters(), lr=0.1), **shared)),
        (OPEN, Facts(optimizer=dummy, scheduler=DummyScheduler(dummy, 10, 2), **shared)),
    ):
        completed = complete(given, facts, **arguments)
        taken = runtime.DeepSpeedConfig(completed.values)
        assert taken.zero_optimization_stage == stage
        assert (taken.train_micro_batch_size_per_gpu, taken.gradient_accumulation_steps) == (4, 2)
        assert taken.train_batch_size == next(value for key, value, _ in completed.rows if key == "train_batch_size")
        assert (taken.managed_gradient_accumulation, taken.gradient_clipping) == (False, 0.0)
        assert (taken.bfloat16_config.enabled, taken.float16_config.enabled) == (
            precision == "bf16", precision == "fp16"
        )  # fmt: skip
        assert taken.scheduler_name is None
        assert taken.optimizer_name == ("adamw" if given else None)
        offloaded = taken.zero_config.offload_optimizer
        assert offload == (offloaded.device.value if hasattr(offloaded.device, "value") else offloaded.device)
        if given:
            assert taken.zero_config.reduce_bucket_size == 64 * 64
            assert taken.optimizer_params == {"lr": 1e-4, "weight_decay": 0.0}
        if "transformer_moe_cls_names" in arguments:
            assert taken.zero_config.leaf_module.classes == ["Linear"]


def test_left_to_itself_deepspeed_clips() -> None:
    """Why a completed configuration always says whether to clip."""
    assert runtime.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1}).gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stages": 2}}, r"`zero_optimization.stages` .*Did you mean 'stage'\?"),
        ({"zero_optimization": {"reduce_bucket": 1}}, "Did you mean 'reduce_bucket_size'"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
         r"`zero_optimization.offload_optimizer.devise` .*Did you mean 'device'"),
        ({"zero_optimization": {"leaf_module": {"class": ["A"]}}}, "leaf_module.class` .*Did you mean 'classes'"),
        ({"fp16": {"loss_scaling": 0}}, "`fp16.loss_scaling` .*Did you mean 'loss_scale'"),
        ({"bf16": {"on": True}}, "It reads bf16_master_weights_and_grads, "),
        ({"tensor_parallel": {"autotp": 2}}, "Did you mean 'autotp_size'"),
        ({"tensor_parallel": {"tp": {"tp_sizes": 2}}}, r"`tensor_parallel.tp.tp_sizes` .*Did you mean 'tp_size'"),
        ({"timers": {"throughput": {"enable": True}}}, "`timers.throughput.enable` .*Did you mean 'enabled'"),
        ({"compile": {"deep_compile": True}}, "Did you mean 'deepcompile'"),
        ({"wandb": {"projects": "x"}}, "Did you mean 'project'"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}},
         r"`zero_optimization.reduce_bucket_size` is 'many' \(`hf_ds_config`\), which DeepSpeed does not take: "),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "gpu"}}},
         r"`zero_optimization.offload_optimizer.device` is 'gpu'"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "`fp16.loss_scale` is -1 .*must be >= 0"),
        ({"scheduler": {"type": "WarmupLr"}}, "no schedule of that name. Did you mean 'WarmupLR'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}}, "Did you mean 'warmup_num_steps'"),
    ],
)  # fmt: skip
def test_names_and_values_inside_sections_are_deepspeeds(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=given))


def test_parameters_of_a_placeholder_are_those_of_the_schedule() -> None:
    dummy = DummyOptim(MODEL.parameters())
    given = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    facts = Facts(optimizer=dummy, scheduler=DummyScheduler(dummy, warmup_typ="linear"))
    with pytest.raises(ConfigError, match=r"`scheduler.params.warmup_typ` .*Did you mean 'warmup_type'"):
        complete(given, facts)


def test_the_names_at_the_top_are_those_of_this_version() -> None:
    """All of its constants that name one."""
    names = (
        "TRAIN_BATCH_SIZE", "TRAIN_MICRO_BATCH_SIZE_PER_GPU", "GRADIENT_ACCUMULATION_STEPS", "STEPS_PER_PRINT",
        "MANAGED_GRADIENT_ACCUMULATION", "GRADIENT_CLIPPING", "COMMUNICATION_DATA_TYPE", "PRESCALE_GRADIENTS",
        "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE", "GRADIENT_PREDIVIDE_FACTOR", "GRADIENT_ALLREDUCE_OP",
        "DISABLE_ALLGATHER", "DUMP_STATE", "DISABLE_PYTHON_GC", "VOCABULARY_SIZE", "WALL_CLOCK_BREAKDOWN",
        "MEMORY_BREAKDOWN", "CHECKPOINT", "DATA_TYPES", "DATALOADER_DROP_LAST", "USE_DATA_BEFORE_EXPERT_PARALLEL",
        "LOG_LEVEL", "OPTIMIZER", "SCHEDULER", "TORCH_AUTOCAST", "ZERO_ALLOW_UNTESTED_OPTIMIZER",
        "ZERO_FORCE_DS_CPU_OPTIMIZER",
    )  # fmt: skip
    constants = import_module("deepspeed.runtime.constants")
    assert {getattr(constants, name) for name in names} <= keys._SECTIONS | keys._VALUES
    for removed in runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS:
        assert removed in keys._REMOVED
    for removed in runtime._REMOVED_ZERO_CONFIG_KEYS:
        assert f"zero_optimization.{removed}" in keys._REMOVED


def test_what_can_be_compiled_here_is_known() -> None:
    assert available.require_deepspeed() is deepspeed
    builders = import_module("deepspeed.ops.op_builder")
    assert not available.has_compiler() or builders.CPUAdamBuilder().is_compatible(verbose=False)
    links = builders.AsyncIOBuilder().is_compatible(verbose=False)
    assert available.has_async_io() == (links and available.has_compiler())


def test_what_came_compiled_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not available.has_compiler()
    assert not available.has_async_io()
    monkeypatch.setitem(import_module("deepspeed.git_version_info").installed_ops, "cpu_adam", True)
    monkeypatch.setitem(import_module("deepspeed.git_version_info").installed_ops, "async_io", True)
    assert available.has_compiler()
    assert available.has_async_io()


def test_division_before_a_model_exists_is_taken_too() -> None:
    said = DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=OPEN, zero_stage=3))
    taken = runtime.DeepSpeedConfig(said.before_model(precision="bf16"))
    assert (taken.zero_optimization_stage, taken.bfloat16_config.enabled) == (3, True)


def _optimizers_built(has_compiler: bool) -> list[tuple[str, list[tuple[float, float, tuple[float, float]]]]]:
    """Class and groups of the optimizer that DeepSpeed makes of the section, without and with offload."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo")
    built = []
    for stage, device in ((1, "none"), (2, "cpu")):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        groups = [{"params": model[0].parameters(), "weight_decay": 0.5}, {"params": model[1].parameters()}]
        optimizer = DummyOptim(groups, lr=0.25, betas=(0.5, 0.75))
        facts = Facts(optimizer=optimizer, micro_batch_size=2, has_compiler=has_compiler)
        section = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
        values = complete(section, facts, zero_stage=stage, offload_optimizer_device=device).values
        engine, *_ = deepspeed.initialize(model=model, model_parameters=optimizer.given_groups, config=values)
        made = engine.basic_optimizer
        settings = [(group["lr"], group["weight_decay"], tuple(group["betas"])) for group in made.param_groups]
        built.append((type(made).__name__, settings))
        engine.destroy()
    dist.destroy_process_group()
    return built


# The first run compiles two operators: minutes on a busy machine. A build that is killed leaves a file named `lock` in
# torch's folder of extensions, for which every later one waits.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("has_compiler", "names"), [(True, ["FusedAdam", "DeepSpeedCPUAdam"]), (False, ["AdamW", "AdamW"])]
)
def test_the_optimizer_of_the_section_is_built_with_or_without_a_compiler(has_compiler: bool, names: list[str]) -> None:
    if has_compiler and not available.has_compiler():
        pytest.skip("there is no C++ compiler here")
    settings = [(0.25, 0.5, (0.5, 0.75)), (0.25, 0.0, (0.5, 0.75))]
    (built,) = run_ranks(_optimizers_built, 1, has_compiler, timeout_s=590, open_process=False)
    assert built == [(name, settings) for name in names]
