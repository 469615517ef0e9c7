"""Local SGD in a run: the windows, the loss scale and the optimizers that go with one model's local steps."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from accel.engine import Engine, refuse_inside
from accel.uneven import send
from accel_parallel import local_sgd
from accel_parallel.optimizer import PreparedOptimizer
from accel_parallel.strategy import OptimizerState
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    from accel.accelerator import Accelerator

__all__ = ["LocalSGD"]


class LocalSGD(local_sgd.LocalSGD):
    """A block in which each process steps one model on its own gradients, and parameters are averaged now and then.

    Every rank must enter, and call `step` after each micro-batch, inside or outside ``accumulate``::

        with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=8) as local_sgd:
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, batch))
                    optimizer.step()
                    optimizer.zero_grad()
                    local_sgd.step()

    A step is one of the optimizer: micro-batches inside an accumulation window do not count. Clipping measures each
    rank's own gradients, and `num_items` divides by each rank's own items. Parameters and floating-point buffers are
    averaged after every `local_sgd_steps` steps and at the end of the block, where every rank also takes over the
    optimizer's state of the main process, so that averaged gradients move all ranks alike from then on.

    Under float16 a step is skipped on all ranks or on none, so that the loss scale and schedules stay alike; that costs
    one exchanged number a step.
    """

    def __init__(
        self, accelerator: Accelerator, *, model: nn.Module, local_sgd_steps: int, enabled: bool = True
    ) -> None:
        """
        Args:
            accelerator: of the run.
            model: prepared, with an optimizer that trains nothing else.
            local_sgd_steps: optimizer steps from one average to the next.
            enabled: whether to do anything. In a world of one process the block does nothing in any case.

        Raises:
            ConfigError: for a model or an optimizer that cannot step by itself, with the reason.
        """
        self._engine = accelerator._engine
        self._process = accelerator.process
        self._optimizers: list[PreparedOptimizer] = []
        super().__init__(model=model, strategy=accelerator.strategy, local_sgd_steps=local_sgd_steps, enabled=enabled)
        if self.enabled:
            self._optimizers = _optimizers_of(self._engine, self.strategy.unwrap(model))

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            refuse_inside(self._engine, "LocalSGD")
            if any(optimizer.window.accumulating for optimizer in self._optimizers):
                raise ConfigError(
                    "`LocalSGD` was entered inside an accumulation window that is not finished, and only some of its "
                    "gradients would be exchanged. Enter it between windows."
                )
        super().__enter__()
        if self.enabled:
            scaler = self._engine.precision.scaler
            self._reduce_before = scaler.reduce_found_inf
            if scaler.enabled:
                scaler.reduce_found_inf = _agree
            self._mark(local=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.enabled:
            self._engine.precision.scaler.reduce_found_inf = self._reduce_before
            self._mark(local=False)
        if error is None and any(optimizer.window.counts_items for optimizer in self._optimizers):
            self._open = False
            self._exits.close()
            raise ConfigError(
                "`LocalSGD` was left inside an accumulation window whose items were counted on each rank alone, so "
                "the rest of it would be divided by something else. Leave the block between windows."
            )
        super().__exit__(kind, error, traceback)
        if self.enabled and error is None:
            for optimizer in self._optimizers:
                self._take_over(optimizer)

    def step(self) -> None:
        """Call after each micro-batch; counts where an accumulation window ended. Averages when it is time."""
        if all(optimizer.window.sync for optimizer in self._optimizers):
            if self.enabled:
                refuse_inside(self._engine, "LocalSGD.step")
            super().step()

    def _mark(self, *, local: bool) -> None:
        for optimizer in self._optimizers:
            optimizer.window.local = local

    def _take_over(self, optimizer: PreparedOptimizer) -> None:
        """Every rank must call this. States of one rank, as that one's optimizer made them, whatever they hold."""
        names = {parameter: str(number) for number, parameter in enumerate(optimizer.window.parameters)}
        inner = self.strategy.optimizer_state(optimizer.optimizer, names)
        is_main = self._process.topology.is_main
        state = send({"state": inner.state, "groups": inner.groups} if is_main else None, self._process, 0)
        if not is_main:
            self.strategy.load_optimizer_state(
                optimizer.optimizer, names, OptimizerState(state=state["state"], groups=state["groups"])
            )


def _agree(found: torch.Tensor) -> None:
    dist.all_reduce(found, op=dist.ReduceOp.MAX)


def _optimizers_of(engine: Engine, model: nn.Module) -> list[PreparedOptimizer]:
    ours = {id(parameter) for parameter in model.parameters()}
    found = [each for each in engine.optimizers if any(id(p) in ours for p in each.window.parameters)]
    _refuse_unfit(found, ours, type(model).__name__)
    return found


def _refuse_unfit(optimizers: Sequence[PreparedOptimizer], ours: set[int], model: str) -> None:
    if not optimizers:
        raise ConfigError(
            f"`LocalSGD` was given a {model} that no prepared optimizer trains, so there are no steps to count. "
            f"Prepare its optimizer, and pass what `prepare` returned for the model."
        )
    for optimizer in optimizers:
        name = type(optimizer.optimizer).__name__
        foreign = sum(id(parameter) not in ours for parameter in optimizer.window.parameters)
        if foreign:
            raise ConfigError(
                f"`LocalSGD` was given a {model} whose optimizer ({name}) also holds {foreign} parameters of other "
                f"models, whose gradients are averaged: its steps would be local for one part only. Give the model an "
                f"optimizer of its own."
            )
        if all(callable(getattr(optimizer.optimizer, mode, None)) for mode in ("train", "eval")):
            raise ConfigError(
                f"`LocalSGD` was given a {model} with a schedule-free optimizer ({name}), which keeps a second copy of "
                f"the parameters that is not averaged with them. Use another optimizer, or leave `LocalSGD` out."
            )
