"""From what a plugin says and what is prepared to the whole configuration of one engine."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from accel_parallel.deepspeed.available import has_async_io, has_compiler
from accel_parallel.deepspeed.config import CompletedConfig, DeepSpeedConfig, Facts, class_names_of, hidden_size_of
from accel_parallel.deepspeed.options import DeepSpeedOptions
from accel_parallel.deepspeed.placeholders import DummyScheduler
from accel_parallel.strategy import Bundle
from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["completed_for"]


def completed_for(
    config: DeepSpeedConfig,
    options: DeepSpeedOptions,
    model: nn.Module,
    optimizer: Optimizer | None,
    bundle: Bundle,
    *,
    process: Process,
) -> CompletedConfig:
    """Every rank must call this. What ``deepspeed.initialize`` gets for a model.

    Args:
        config: of the plugin that is selected.
        options: of the strategy.
        model: about to be prepared.
        optimizer: that trains it; ``None`` for one that is not trained.
        bundle: what is prepared with it.
        process: the open process.

    Raises:
        ConfigError: for what contradicts the facts.
    """
    placeholders = [each for each in bundle.schedulers if isinstance(each, DummyScheduler)]
    topology = process.topology
    facts = Facts(
        world_size=topology.data_world_size,
        micro_batch_size=bundle.batch_size,
        num_steps=bundle.num_steps,
        precision=options.precision,
        precision_source=options.precision_source,
        hidden_size=hidden_size_of(model),
        module_classes=class_names_of(model),
        optimizer=optimizer,
        scheduler=placeholders[0] if placeholders and optimizer is not None else None,
        tp_size=topology.shape.tp,
        sp_size=topology.shape.sp,
        device_type=process.device.type,
        has_compiler=has_compiler(),
        has_async_io="nvme" not in config.offload_devices or has_async_io(),
    )
    if config.stage != "auto":
        completed = config.complete(facts)
    elif optimizer is None:
        completed = config.complete(facts, stage=0, because="nothing is trained")
    else:
        completed = _with_chosen_stage(config, facts, model, optimizer, process)
    _refuse_other_buffers(completed)
    return completed


def _refuse_other_buffers(completed: CompletedConfig) -> None:
    """DeepSpeed has optimizers whose gradients or weights lie elsewhere than in those of ZeRO."""
    values = completed.values
    widened = values.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32")
    narrow = next((name for name in ("bf16", "fp16") if values.get(name, {}).get("enabled")), None)
    if completed.stage == 1 and narrow == "bf16" and widened:
        raise ConfigError(
            "`data_types.grad_accum_dtype` is 'fp32' at ZeRO stage 1 in bfloat16, for which DeepSpeed has another "
            "optimizer, whose buffers are not read here. Use `zero_stage=2`, which takes less memory too."
        )
    if completed.stage == 0 and narrow is not None and "optimizer" in values:
        raise ConfigError(
            f"The configuration has an `optimizer` section at ZeRO stage 0 in {narrow}, where DeepSpeed keeps float32 "
            f"weights of many parameters as one, which is not read here. Use `zero_stage=1`, or an optimizer of torch."
        )


def _with_chosen_stage(
    config: DeepSpeedConfig, facts: Facts, model: nn.Module, optimizer: Optimizer, process: Process
) -> CompletedConfig:
    """By the cost model, on the least memory that any rank has."""
    from accel_parallel.auto import agreed_hardware  # only for those who ask for it
    from accel_parallel.deepspeed.stage import ZeroSizes, choose_stage

    chosen = choose_stage(
        model,
        hardware=agreed_hardware(process),
        world_size=facts.world_size,
        precision=facts.precision,
        optimizer=optimizer,
        batch_size=facts.micro_batch_size,
        num_steps=facts.num_steps,
        sizes=ZeroSizes.of(config.section("zero_optimization"), hidden_size=facts.hidden_size),
        device=process.device.type,
        offload_optimizer=config.said("zero_optimization.offload_optimizer.device"),  # type: ignore[arg-type]
        offload_param=config.said("zero_optimization.offload_param.device"),  # type: ignore[arg-type] # refuses more
    )
    if process.topology.is_main:
        print(chosen.explain(), flush=True)
    return config.complete(
        facts,
        stage=chosen.stage,
        offload_optimizer=chosen.offload_optimizer,
        offload_param=chosen.offload_param,
        because=f"chosen by the cost model: {chosen.reasons[0]}",
    )
