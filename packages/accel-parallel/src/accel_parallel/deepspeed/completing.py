"""From what a plugin says and what is prepared to the whole configuration of one engine."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from accel_parallel.deepspeed.available import has_async_io, has_compiler
from accel_parallel.deepspeed.config import CompletedConfig, DeepSpeedConfig, Facts, class_names_of, hidden_size_of
from accel_parallel.deepspeed.options import DeepSpeedOptions
from accel_parallel.deepspeed.placeholders import DummyScheduler
from accel_parallel.strategy import Bundle
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
        return config.complete(facts)
    if optimizer is None:
        return config.complete(facts, stage=0, because="nothing is trained")
    return _with_chosen_stage(config, facts, model, optimizer, process)


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
