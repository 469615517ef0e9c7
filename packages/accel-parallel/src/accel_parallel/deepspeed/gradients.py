"""The gradients of one DeepSpeed engine, from the first backward of a window to its step.

The caller owns the window: DeepSpeed runs with ``managed_gradient_accumulation: false``, so a backward only adds, and a
step is the end. (Where DeepSpeed counts, two backwards before one step lose the first one's gradients at stages 1 and
2.) What is to be done to gradients before the step is done in one of two ways. At stages 1 to 3 a step divides by the
loss scale on its way, so every factor goes into that, wherever the gradients lie, be it on a disk. At stage 0 they are
whole and lie in ``grad``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accel_parallel.clip import gradients_of, scale_gradients_
from accel_parallel.deepspeed.tensor import TensorDivision
from accel_state.errors import ConfigError

__all__ = ["Gradients", "gradients_held_by", "whole_gradients"]

_EPSILON = 1e-6
"""Added to the norm before dividing by it, as `torch.nn.utils.clip_grad_norm_` does."""


def gradients_held_by(
    engine: Any, parameters: Sequence[torch.Tensor], *, stage: int, division: TensorDivision
) -> Gradients:
    """What holds the gradients of an engine with an optimizer.

    Args:
        engine: what ``deepspeed.initialize`` gave.
        parameters: that its optimizer trains.
        stage: of ZeRO.
        division: of the model along tp.
    """
    if stage == 0:
        return _WholeGradients(engine, parameters, division)
    return _DividedGradients(engine, parameters, stage=stage)


def whole_gradients(strategy: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """Every rank must call this. Gradients of a complete window by parameter name, through DeepSpeed's own accessors.

    As the step would see them, but for the loss scale. Used by the contract of strategies; nothing can be added after.
    """
    from deepspeed.utils import safe_get_full_grad  # type: ignore[import-not-found,import-untyped,unused-ignore]

    held: Gradients = strategy._trained
    held.finish()
    return {
        name: safe_get_full_grad(parameter).detach().clone() / float(held.divisor)
        for name, parameter in strategy.unwrap(model).named_parameters()
        if parameter.requires_grad
    }


class Gradients(ABC):
    """What a window has gathered for its step."""

    def __init__(self, engine: Any, parameters: Sequence[torch.Tensor]) -> None:
        self.engine = engine
        self.parameters = parameters
        self.present = False
        """Whether any backward ran since the last step."""
        self.complete = False
        """Whether they have been added up over ranks, after which none can be added."""
        self.divisor: float | torch.Tensor = 1.0
        """What the step divides them by, besides the loss scale."""

    def backward(self, loss: torch.Tensor, *, retain_graph: bool) -> None:
        """Add those of `loss`."""
        if self.complete:
            raise ConfigError(
                "`backward` was called after the gradients of its window were clipped, and DeepSpeed has added them up "
                "over the processes by then, so that no others can follow. Clip after the last backward of a window, "
                "and step after that."
            )
        if not _is_one(self.divisor):
            loss = loss * self.divisor
        if self.present:
            self._before_another()
        self.present = True
        self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    def divide(self, by: float | torch.Tensor) -> None:
        """Let the step divide by a number, all that is there and all that is still to come."""
        self.divisor = self.divisor * by

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Every rank must call this. Their norm; where `max_norm` is given, the step divides them down to it."""
        if not self.present:
            return torch.zeros((), device=self.engine.device)
        norm = self._norm()
        if max_norm is not None:
            self.divide(((norm + _EPSILON) / max_norm).clamp(min=1.0))  # by infinity for a `max_norm` of zero
        return norm

    def step(self) -> bool:
        """Every rank must call this. Step and drop them; false if they were not finite and nothing was changed."""
        if not self.present:
            if getattr(self.engine.optimizer, "_backward_seen_this_step", False):
                raise ConfigError(
                    "`loss.backward()` was called on the loss of a model that DeepSpeed trains, and its gradients are "
                    "nowhere to be stepped on: scales and windows are the Accelerator's. Call "
                    "`accelerator.backward(loss)`."
                )
            return True
        self._before_step()
        try:
            with _finished(self.engine) if self.complete else nullcontext():
                self.engine.step()
        finally:
            self._after_step()
        self.present, self.complete, self.divisor = False, False, 1.0
        return bool(self.engine.was_step_applied())

    def drop(self) -> None:
        """Forget them."""
        if self.present:
            self._drop()
        self.present, self.complete, self.divisor = False, False, 1.0

    @abstractmethod
    def clamp(self, bound: float) -> None:
        """Every rank must call this. Bound each entry."""

    @abstractmethod
    def finish(self) -> None:
        """Every rank must call this. Add them up over ranks, after which none can be added; again does nothing."""

    @abstractmethod
    def _before_another(self) -> None:
        """A backward of this window has run already."""

    @abstractmethod
    def _norm(self) -> torch.Tensor: ...

    @abstractmethod
    def _drop(self) -> None: ...

    @abstractmethod
    def _before_step(self) -> None: ...

    @abstractmethod
    def _after_step(self) -> None: ...


class _WholeGradients(Gradients):
    """Of stage 0: in ``grad``, alike on all ranks once they are averaged, but for parts along tp."""

    def __init__(self, engine: Any, parameters: Sequence[torch.Tensor], division: TensorDivision) -> None:
        super().__init__(engine, parameters)
        self._division = division

    def clamp(self, bound: float) -> None:
        self.finish()
        for gradient in gradients_of(self.parameters):
            gradient.clamp_(-bound * self._scale, bound * self._scale)

    def _norm(self) -> torch.Tensor:
        self.finish()
        total = self._squares(divided=True)
        if self._division:
            dist.all_reduce(total, group=self._division.group)
        return (total + self._squares(divided=False)).sqrt() / self._scale

    def _squares(self, *, divided: bool) -> torch.Tensor:
        held = [each for each in self.parameters if (self._division.of(each) is not None) == divided]
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients_of(held)]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.engine.device)

    @property
    def _scale(self) -> float:
        return float(getattr(self.engine.optimizer, "cur_scale", 1.0))

    def finish(self) -> None:
        if not self.complete:
            with _boundary(self.engine):
                self.engine.allreduce_gradients()
            self.complete = True
        if not _is_one(self.divisor):
            scale_gradients_(gradients_of(self.parameters), 1.0 / self.divisor)
            self.divisor = 1.0

    def _before_another(self) -> None: ...

    def _drop(self) -> None:
        self.engine.zero_grad()

    def _before_step(self) -> None:
        if not _is_one(self.divisor):
            self.finish()

    def _after_step(self) -> None: ...


class _DividedGradients(Gradients):
    """Of stages 1 to 3: this rank's parts, scaled by the loss scale, in buffers of DeepSpeed's optimizer."""

    def __init__(self, engine: Any, parameters: Sequence[torch.Tensor], *, stage: int) -> None:
        super().__init__(engine, parameters)
        self._stage = stage
        self._optimizer = engine.optimizer
        self._measured: torch.Tensor | None = None
        """Norm of the gradients as they lie there, loss scale included, where `clip` has asked for it."""
        self._steps_on_updates = any(getattr(parameter, "use_muon", False) for parameter in parameters)
        """Whether DeepSpeed makes something else of gradients before it measures them in its step, as Muon does."""

    def _before_another(self) -> None:
        # Stage 3 begins to add, and no longer overwrites, in the next forward, which may have been before both.
        self._optimizer.clear_backward_seen_flag()

    def clamp(self, bound: float) -> None:
        if self._is_offloaded:
            raise ConfigError(
                "`clip_grad_value_` was called, and gradients of an offloaded optimizer are with it, their norms "
                "counted already. Use `clip_grad_norm_`, or keep the optimizer on the device."
            )
        self.finish()
        self._measured = None
        limit = bound * float(self._optimizer.loss_scale * self.divisor)
        for parts in self._optimizer.averaged_gradients.values():
            for part in parts or ():
                part.clamp_(-limit, limit)

    def _norm(self) -> torch.Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups  # type: ignore[import-not-found,import-untyped,unused-ignore]

        self.finish()
        optimizer = self._optimizer
        if self._measured is None:
            norm = (
                combine_grad_norm_groups(optimizer._get_norm_groups())
                if self._stage == 3
                else optimizer.scaled_global_norm()
            )
            self._measured = torch.as_tensor(norm)
        scaled = self._measured
        found = scaled / (optimizer.loss_scale * torch.as_tensor(self.divisor, device=scaled.device))
        return torch.where(scaled < 0, math.inf, found).to(torch.float32)  # below zero stands for one not finite

    def finish(self) -> None:
        if self.complete:
            return
        with _boundary(self.engine):
            if self._stage >= 2:
                self._optimizer.finalize_gradient_accumulation_boundary()
            else:
                self.engine.allreduce_gradients()
        self.complete = True

    def _drop(self) -> None:
        optimizer = self._optimizer
        self.finish()  # what waits in buckets may belong to a sum that ranks have begun
        optimizer.zero_grad(set_to_none=True)
        if self._is_offloaded:
            optimizer.reset_cpu_buffers()
        if self._stage < 3:
            optimizer.micro_step_id = -1
            for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                for key in held:
                    held[key] = None
        self._clear()

    def _before_step(self) -> None:
        optimizer = self._optimizer
        # A scale that grows in this very step is for the next window: these gradients have the present one.
        optimizer.external_loss_scale = float(optimizer.loss_scaler.cur_scale * self.divisor)
        optimizer.custom_loss_scaler = True
        known = self._measured
        if known is not None and not self._steps_on_updates:  # it would measure and exchange the same once more
            if self._stage == 3:
                optimizer._get_norm_groups = lambda: [known]
            else:
                optimizer.scaled_global_norm = lambda norm_type=2: known

    def _after_step(self) -> None:
        self._optimizer.custom_loss_scaler = False
        for name in ("_get_norm_groups", "scaled_global_norm"):
            self._optimizer.__dict__.pop(name, None)  # and the class's own is there again
        self._clear()

    @property
    def _is_offloaded(self) -> bool:
        optimizer = self._optimizer
        return bool(optimizer.offload_optimizer if self._stage == 3 else optimizer.cpu_offload)

    def _clear(self) -> None:
        """Zero what outlives a window, which DeepSpeed overwrites only for parameters that the next one uses."""
        self._measured = None
        optimizer = self._optimizer
        optimizer.clear_backward_seen_flag()
        if self._stage == 3:
            optimizer.micro_step_id = 0
            optimizer.grad_partitions_flat_buffer.zero_()
        if self._is_offloaded:
            stepped = (
                optimizer.fp32_partitioned_groups_flat
                if self._stage == 3
                else (optimizer.single_partition_of_fp32_groups)
            )
            for flat in stepped:
                if flat.grad is not None:
                    flat.grad.zero_()
            for sums in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
                sums.zero_()


@contextmanager
def _boundary(engine: Any) -> Iterator[None]:
    """While open, the engine takes itself for inside a step, where sums over ranks are due."""
    engine._running_engine_step = True
    try:
        yield
    finally:
        engine._running_engine_step = False


@contextmanager
def _finished(engine: Any) -> Iterator[None]:
    """While open, a step of the engine finds its gradients added up already."""
    engine._config.managed_gradient_accumulation = True
    engine._is_gradient_accumulation_boundary = True
    try:
        yield
    finally:
        engine._is_gradient_accumulation_boundary = None
        engine._config.managed_gradient_accumulation = False


def _is_one(value: float | torch.Tensor) -> bool:
    return not isinstance(value, torch.Tensor) and value == 1.0
