"""From a model, an optimizer and a completed configuration to a DeepSpeed engine, and the process that it finds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from accel_parallel.deepspeed.available import require_deepspeed
from accel_parallel.deepspeed.placeholders import DummyOptim
from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["adopt_group", "build_engine"]


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
    os.environ.setdefault("LOCAL_RANK", str(process.topology.local_rank))
    process.require_group()
    if state.cdb is not None and getattr(state.cdb, "accel_group", None) is not dist.group.WORLD:
        state.cdb = None  # of a group that has ended since
        groups._WORLD_GROUP = None
    if state.cdb is None:
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
    *,
    extra: Mapping[str, Any],
) -> Any:
    """Every rank must call this. What ``deepspeed.initialize`` makes.

    Args:
        model: on any device, or divided while it was built.
        optimizer: of the model; a `DummyOptim` lets DeepSpeed make the one that it stands for.
        values: the whole configuration.
        extra: further arguments, such as ``mpu``.
    """
    import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]

    arguments: dict[str, Any] = dict(extra)
    if isinstance(optimizer, DummyOptim):
        arguments["model_parameters"] = optimizer.given_groups
    elif optimizer is not None:
        arguments["optimizer"] = optimizer
    engine, *_ = deepspeed.initialize(model=model, config=dict(values), dist_init_required=False, **arguments)
    return engine
