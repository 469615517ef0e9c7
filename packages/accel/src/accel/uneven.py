"""Training while ranks run out of batches at different times.

The ranks that are through stand in for the exchange of gradients, but take no steps. So at the end they take over what
the last rank has: parameters and buffers, as the strategy sends them, and here the states of optimizers, schedulers,
accumulation windows and the loss scaler. Without that, the same gradients would move each rank elsewhere from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accel.engine import Engine, refuse_inside
from accel_parallel.accumulation import Window
from accel_parallel.optimizer import PreparedOptimizer
from accel_parallel.strategy import OptimizerState
from accel_state.collectives import broadcast, broadcast_object_list
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.tree import map_tensors

__all__ = ["join_uneven_inputs", "send", "take_over"]


@contextmanager
def join_uneven_inputs(
    models: Sequence[nn.Module],
    *,
    engine: Engine,
    loaders: Sequence[Any],
    process: Process,
    even_batches: bool | None,
    dealt: bool,
) -> Iterator[None]:
    """What `Accelerator.join_uneven_inputs` does. Every rank must enter.

    Args:
        models: what the block trains.
        engine: of the run.
        loaders: all that are prepared.
        process: the open process.
        even_batches: what the loaders do in the block; ``None`` for what they do anyhow.
        dealt: whether rank 0 deals the loaders' batches out.
    """
    refuse_inside(engine, "join_uneven_inputs")
    several = process.topology.world_size > 1
    if several:
        _check(engine, loaders, even_batches, dealt)
    before = [(loader, loader.even_batches) for loader in loaders] if even_batches is not None else []
    try:
        for loader, _ in before:
            loader.even_batches = even_batches
        with engine.strategy.join(models, settle=lambda source: take_over(engine, process, source)):
            engine.joining = several
            try:
                yield
            finally:
                engine.joining = False
    finally:
        for loader, even in before:
            loader.even_batches = even


def take_over(engine: Engine, process: Process, source: int) -> None:
    """Every rank must call this. What steps change besides models becomes on every rank what it is on `source`."""
    ours = process.topology.rank == source
    state = send(_state(engine) if ours else None, process, source)
    if ours:
        return
    for optimizer, of_optimizer in zip(engine.optimizers, state["optimizers"], strict=True):
        _load_optimizer(engine, optimizer, of_optimizer)
    for scheduler, of_scheduler in zip(engine.schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(of_scheduler)
        scheduler.settle()
    if engine.precision.scaler.enabled:
        engine.precision.scaler.load_state_dict(state["scaler"])


def _check(engine: Engine, loaders: Sequence[Any], even_batches: bool | None, dealt: bool) -> None:
    if any(window.accumulating for window in engine.accumulation.windows):
        raise ConfigError(
            "`join_uneven_inputs` was entered inside an accumulation window that is not finished, whose gradients "
            "have not been exchanged and would be lost with a rank that has no batch. Enter it between windows."
        )
    if even_batches is not None and not loaders:
        raise ConfigError(
            f"`even_batches={even_batches}` was given to `join_uneven_inputs`, and no data loader is prepared whose "
            f"batches it could change. Leave it out, or prepare the loader."
        )
    if dealt and any(not (loader.even_batches if even_batches is None else even_batches) for loader in loaders):
        raise ConfigError(
            "`join_uneven_inputs` was entered with `dispatch_batches=True` and without even batches: a rank that gets "
            "no part of a batch asks rank 0 for the next one, while rank 0 waits for it in its step. "
            "Set `dispatch_batches=False`, or keep `even_batches=True`."
        )


def _state(engine: Engine) -> dict[str, Any]:
    return {
        "optimizers": [_optimizer_state(engine, optimizer) for optimizer in engine.optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in engine.schedulers],
        "scaler": engine.precision.scaler.state_dict() if engine.precision.scaler.enabled else {},
    }


def _optimizer_state(engine: Engine, optimizer: PreparedOptimizer) -> dict[str, Any]:
    inner = engine.strategy.optimizer_state(optimizer.optimizer, _numbered(optimizer))
    return {
        "state": inner.state,
        "groups": inner.groups,
        "steps_taken": optimizer.steps_taken,
        "step_was_skipped": optimizer.step_was_skipped,
        "window": optimizer.window.place(),
        "gradients": _gradients(optimizer.window),
    }


def _load_optimizer(engine: Engine, optimizer: PreparedOptimizer, state: dict[str, Any]) -> None:
    inner = OptimizerState(state=state["state"], groups=state["groups"])
    engine.strategy.load_optimizer_state(optimizer.optimizer, _numbered(optimizer), inner)
    optimizer.steps_taken, optimizer.step_was_skipped = state["steps_taken"], state["step_was_skipped"]
    optimizer.window.move_to(state["window"])
    for parameter, gradient in zip(optimizer.window.parameters, state["gradients"], strict=True):
        if isinstance(gradient, torch.Tensor) and parameter.grad is not None:
            parameter.grad.copy_(gradient)
        elif gradient is None or isinstance(gradient, torch.Tensor):
            parameter.grad = gradient


def _numbered(optimizer: PreparedOptimizer) -> dict[torch.Tensor, str]:
    return {parameter: str(number) for number, parameter in enumerate(optimizer.window.parameters)}


def _gradients(window: Window) -> list[torch.Tensor | bool | None]:
    """Those of an unfinished window; of another one only whether there are any, which the next one clears."""
    gradients = [parameter.grad for parameter in window.parameters]
    return list(gradients) if window.accumulating else [None if each is None else True for each in gradients]


def send(tree: Any, process: Process, source: int) -> Any:
    """Every rank must call this. `tree` of `source`, on every rank: tensors of a device stay on theirs."""
    ours = process.topology.rank == source
    skeleton = map_tensors(tree, lambda tensor: tensor.detach() if tensor.device.type == "cpu" else tensor.to("meta"))
    (skeleton,) = broadcast_object_list([skeleton], source, process=process)

    def received(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        sent: torch.Tensor = broadcast(torch.empty_like(tensor, device=process.device), source, process=process)
        return sent

    def sent_on(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.device.type == "cpu" else broadcast(tensor, source, process=process)

    return map_tensors(tree, sent_on) if ours else map_tensors(skeleton, received)
