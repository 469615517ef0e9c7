"""From a model, an optimizer and a completed configuration to a DeepSpeed engine, and the process that it finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from accel_parallel.deepspeed.available import require_deepspeed
from accel_parallel.deepspeed.operators import tell_of_locks
from accel_parallel.deepspeed.placeholders import DummyOptim
from accel_state.env import tell_others
from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["adopt_group", "build_engine"]

_GROUPS = ("_WORLD_GROUP", "mpu", "_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")
"""What DeepSpeed keeps of a world as long as the interpreter lives, though another may follow."""


def adopt_group(process: Process) -> None:
    """Every rank must call this. Let DeepSpeed communicate over the group that is open already.

    Raises:
        ConfigError: if it computes on another kind of device than the process.
    """
    require_deepspeed()
    from deepspeed import comm  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from deepspeed.accelerator import get_accelerator  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from deepspeed.comm import comm as state  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from deepspeed.utils import groups  # type: ignore[import-not-found,import-untyped,unused-ignore]

    computes = get_accelerator().device_name()
    if computes != process.device.type:
        raise ConfigError(
            f"The run computes on `{process.device}`, and DeepSpeed on {computes!r}, which it decided when it was "
            f"imported. Set DS_ACCELERATOR={process.device.type} in the environment of the launch, or leave out what "
            f"chose the other device."
        )
    # The one place where DeepSpeed looks for it, at stage 3 in every step; launchers set it, a bare script may not.
    tell_others("LOCAL_RANK", str(process.topology.local_rank))
    process.require_group()
    if state.cdb is not None and getattr(state.cdb, "accel_group", None) is not dist.group.WORLD:
        state.cdb = None  # of a group that has ended since
        for name in _GROUPS:
            setattr(groups, name, None)
    if state.cdb is None:
        tell_of_locks()
        comm.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
        )
        setattr(state.cdb, "accel_group", dist.group.WORLD)  # noqa: B010  # of another package, to know it again by


def build_engine(
    model: nn.Module,
    optimizer: Optimizer | None,
    values: Mapping[str, Any],
) -> Any:
    """Every rank must call this. What ``deepspeed.initialize`` makes.

    Args:
        model: on any device, or divided while it was built.
        optimizer: of the model; a `DummyOptim` lets DeepSpeed make the one that it stands for.
        values: the whole configuration.
    """
    import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]

    arguments: dict[str, Any] = {}
    if isinstance(optimizer, DummyOptim):
        arguments["model_parameters"] = optimizer.given_groups
    elif optimizer is not None:
        arguments["optimizer"] = optimizer
    from deepspeed.accelerator import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        get_accelerator,
    )

    if values.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"`mixed_precision='fp16'` was asked for, and DeepSpeed does not train in float16 on "
            f"{get_accelerator().device_name()!r}. Use 'bf16' or 'no' there."
        )
    if "activation_checkpointing" in values:  # for models that call DeepSpeed's own `checkpointing.checkpoint`
        deepspeed.checkpointing.configure(None, deepspeed_config=dict(values))
    engine, *_ = deepspeed.initialize(model=model, config=dict(values), dist_init_required=False, **arguments)
    _take_back_first_step(engine)
    _answer_modes(engine)
    return engine


def _answer_modes(engine: Any) -> None:
    """Let ``train()`` and ``eval()`` return the model and be seen in ``training``, as those of every module."""
    change = engine.train

    def train(mode: bool = True) -> Any:
        change(mode)
        engine.training = mode
        return engine

    engine.train = train
    engine.eval = lambda: train(False)


def _take_back_first_step(engine: Any) -> None:
    """At stage 0 in 16 bits, DeepSpeed steps once on zeros to make states: that decays weights, and counts."""
    masters = getattr(engine.optimizer, "fp32_groups", None)
    if masters is None:
        return
    engine.basic_optimizer.state.clear()
    for narrow, wide in zip(engine.optimizer.fp16_groups, masters, strict=True):
        for parameter, master in zip(narrow, wide, strict=True):
            master.data.copy_(parameter.data)
