"""What happens between a batch and an optimizer step: the strategy, the precision and the accumulation, put together.

Choices are made in `prepare`; a step only follows them. What a backend does itself (`Strategy.owns`) is asked here and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from accel.loops import Loops
from accel_parallel.accumulation import Accumulation, Scope, Window
from accel_parallel.audit import audit_model, audit_optimizer
from accel_parallel.audit_ranks import audit_ranks
from accel_parallel.dtype_table import DtypeRow, changed_dtypes, dtype_table, dtypes_of, format_dtype_table
from accel_parallel.lomo import FusedOptimizer, audit_fused, steps_in_backward
from accel_parallel.optimizer import PreparedOptimizer
from accel_parallel.plugins import GradientAccumulationPlugin
from accel_parallel.scheduler import PreparedScheduler
from accel_parallel.strategy import Bundle, Duty, Strategy
from accel_precision.scaler import NoScaler
from accel_state.errors import ConfigError
from accel_state.logging import get_logger
from accel_state.protocols import LossScaler, Precision, StatefulLoader

__all__ = ["Engine", "refuse_inside", "refuse_saving"]

logger = get_logger(__name__)


class Engine:
    """Holds everything that was prepared, and runs backward, clipping and stepping for it."""

    def __init__(
        self, *, strategy: Strategy, precision: Precision, accumulation: GradientAccumulationPlugin, loops: Loops
    ) -> None:
        self.precision = precision
        self.loops = loops
        self.models: list[nn.Module] = []
        """As they were handed back: what users hold."""
        self.optimizers: list[PreparedOptimizer] = []
        self.schedulers: list[PreparedScheduler] = []
        self.joining = False
        """Whether ranks may have left a block for uneven inputs, so that only gradients can be exchanged."""
        self._fused: FusedOptimizer | None = None
        """The optimizer that runs backward by itself, if there is one."""
        self._windows_of_model: dict[int, tuple[Window, ...]] = {}
        """By identity, of the models as they were given and as they were handed back."""
        self._wrapped: dict[int, nn.Module] = {}
        """As it was handed back, by the same."""
        self._tables: list[list[DtypeRow]] = []
        """What each of the models held when it was given."""
        self.strategy: Strategy
        self.accumulation: Accumulation
        self.adopt(strategy, accumulation)

    def adopt(self, strategy: Strategy, accumulation: GradientAccumulationPlugin | None = None) -> None:
        """Spread what is prepared from now on by `strategy`. Only before anything is."""
        plugin = accumulation or self.accumulation.plugin
        self.strategy = strategy
        self.accumulation = Accumulation(plugin, strategy)
        self._scales = self.precision.scaler.enabled and Duty.SCALE not in strategy.owns
        self._averages = Duty.AVERAGE not in strategy.owns
        self._is_special = self._scales
        """Whether a backward is more than that of the strategy, whatever its window."""
        each = plugin.sync_each_batch
        self._exchanges_each_batch = strategy.average_size == 1 or (
            strategy.exchanges_each_batch if each is None else each
        )
        if self._scales:
            self.precision.scaler.reduce_found_inf = strategy.reduce_found_inf

    def prepare(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Any] = (),
        batch_size: int | None = None,
    ) -> Bundle:
        """Audit, cast, wrap and bind. Every rank must call this, with its objects in the same order.

        Args:
            models: to be spread.
            optimizers: of these models, or of earlier ones.
            schedulers: of these optimizers; `prepare_scheduler` gives what to use.
            batch_size: rows that a rank takes from the loaders, where that is known.

        Raises:
            ConfigError: for what would go wrong without a word later; see `accel_parallel.audit`.
        """
        _refuse_prepared(optimizers, PreparedOptimizer)
        known = [*self.models, *(self.strategy.unwrap(model) for model in self.models)]
        for index, model in enumerate(models):
            number = len(self.models) + index
            audit_model(
                model,
                name=f"model number {number}",
                prepared=known,
                meta_is_filled=self.strategy.fills_meta,
                is_exchanged=self.strategy.average_size > 1,
                may_be_spread=self.strategy.average_size == 1 and self.strategy.state_layout == "full",
            )
            if Duty.SCALE not in self.strategy.owns:
                self.precision.check(model, name="model" if number == 0 else f"model_{number}")
            known.append(model)
        for index, optimizer in enumerate(optimizers):
            others = [prepared.optimizer for prepared in self.optimizers] + list(optimizers[:index])
            name = f"optimizer number {len(self.optimizers) + index}"
            audit_optimizer(optimizer, name=name, models=known, others=others)
        audit_fused(
            optimizers,
            prepared=[each.optimizer for each in self.optimizers],
            num_steps=self.accumulation.num_steps,
            scales=self._scales,
        )
        if models or optimizers:
            audit_ranks(models, optimizers, first=len(self.models))
        dtypes = [dtypes_of(model) for model in models]
        tables = [dtype_table(model) for model in models]
        for model in models:
            self.precision.wrap_forward(model)
        bundle = self.strategy.prepare(
            Bundle(tuple(models), tuple(optimizers), tuple(schedulers), batch_size, self.accumulation.num_steps)
        )
        self.models += bundle.models
        self._tables += tables
        for model, before in zip(bundle.models, dtypes, strict=True):
            self._tell_changes(before, self.strategy.unwrap(model))
        prepared = tuple(self._bind(made, given) for made, given in zip(bundle.optimizers, optimizers, strict=True))
        for model in self.models:
            for known_as in (model, self.strategy.unwrap(model)):
                self._windows_of_model[id(known_as)] = self._find_windows(model)
                self._wrapped[id(known_as)] = model
        return Bundle(bundle.models, prepared)

    @property
    def scaler(self) -> LossScaler | None:
        """What scales losses here; ``None`` where nobody does, or the strategy does by itself."""
        return self.precision.scaler if self._scales else None

    def explain(self) -> list[str]:
        """Lines on what the strategy's backend does, and which dtypes each model holds and was given with."""
        parts = self.strategy.explain()
        for index, (model, given) in enumerate(zip(self.models, self._tables, strict=True)):
            inner = self.strategy.unwrap(model)
            now = dtype_table(inner)
            heading = f"model number {index}, {type(inner).__name__}"
            if now != given:
                parts += ["", f"{heading}, as it was given:", format_dtype_table(given)]
            parts += ["", f"{heading}, as it is prepared:", format_dtype_table(now)]
        return parts

    def prepare_scheduler(self, scheduler: Any, *, follow: bool) -> PreparedScheduler:
        """Let a scheduler follow the optimizer that it was made for.

        Raises:
            ConfigError: if that optimizer is not prepared, or the scheduler is already.
        """
        _refuse_prepared([scheduler], PreparedScheduler)
        if hasattr(scheduler, "param_groups"):
            raise ConfigError(
                f"`prepare` was given a {type(scheduler).__name__}, which has parameter groups as an optimizer has, "
                f"but is no `torch.optim.Optimizer`, so where it keeps its state is not known. Use one that is, "
                f"such as `AdamWScheduleFree` instead of a `ScheduleFreeWrapper`."
            )
        target = getattr(scheduler, "optimizer", None)
        optimizers = [
            each for each in self.optimizers if any(target is one for one in (each, each.optimizer, each.given))
        ]
        if not optimizers:
            raise ConfigError(
                f"{type(scheduler).__name__} belongs to an optimizer ({type(target).__name__}) that is not prepared, "
                "so it "
                f"is not known when that one really steps. Prepare the optimizer together with it or before it."
            )
        real = self.strategy.scheduler_for(scheduler, optimizers[0].optimizer)
        prepared = PreparedScheduler(real, optimizers=optimizers, follow=follow)
        self.schedulers.append(prepared)
        return prepared

    def backward(
        self, loss: torch.Tensor, num_items: int | float | torch.Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Run backward on `loss` at the scale that makes the window's gradient exact."""
        accumulation = self.accumulation
        if num_items is None and not self._is_special and accumulation.is_trivial:
            self.strategy.backward(loss, **kwargs)
            return
        if num_items is not None:
            refuse_inside(self, "backward(loss, num_items=...)")
        if self._averages:
            loss = accumulation.scale_loss(loss, num_items)
        if self._scales:
            if accumulation.between_windows:
                self.precision.scaler.update()
            loss = self.precision.scaler.scale(loss)
        if self._fused is None:
            self.strategy.backward(loss, **kwargs)
        else:
            self._fused.run_backward(loss, kwargs.pop("learning_rate", None), kwargs)
        if self._averages:
            accumulation.after_backward()

    def lomo_backward(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Backward and step in one, at this rate.

        Raises:
            ConfigError: if no prepared optimizer does that.
        """
        if self._fused is None:
            raise ConfigError(
                "`lomo_backward` was called, and no prepared optimizer steps inside backward (by a method "
                "`fused_backward`, as LOMO has). Prepare one, or call `backward(loss)`."
            )
        self.backward(loss, None, {"learning_rate": learning_rate})

    def accumulate(self, models: tuple[nn.Module, ...], num_steps: int | None = None) -> AbstractContextManager[None]:
        """One micro-batch of these models (all: none given), in windows of `num_steps` if not those of all.

        Raises:
            ConfigError: for a model that is not prepared.
        """
        windows = self._windows(models) if models else None
        scope = self.accumulation.enter(windows, self.loops.remaining, num_steps)
        for window in scope.windows:
            self.loops.feed(window, first=window.micro_steps == 1)
        if self.joining or self._exchanges_each_batch:
            return scope
        quiet = [
            model
            for model in (models or self.models)
            if not any(window.sync for window in (self._windows_of_model[id(model)] or scope.windows))
        ]
        return _Quiet(scope, [self.strategy.no_sync(self._wrapped[id(model)]) for model in quiet]) if quiet else scope

    def sync_in_backward(self, model: nn.Module) -> AbstractContextManager[Any]:
        """While open, `backward` exchanges the gradients of `model`.

        Raises:
            ConfigError: inside `LocalSGD`, whose gradients stay where they are.
        """
        if any(window.local for window in self._windows_of_model.get(id(model), ())):
            raise ConfigError(
                f"`trigger_sync_in_backward` was given a {type(model).__name__} that is inside `LocalSGD`, where each "
                f"rank steps on its own gradients and only parameters are averaged. Leave that block first."
            )
        return self.strategy.sync_in_backward(model)

    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        """Clip at the end of a window; before it only measure, since the sum is not complete."""
        parameters = _listed(parameters)
        optimizers = self._optimizers_of(parameters)
        if not all(optimizer.window.sync for optimizer in optimizers):
            norm = self.strategy.grad_norm(parameters, norm_type)
            return norm / self._current_scale() if self._scales else norm
        for optimizer in optimizers:
            optimizer.unscale_()
        return self.strategy.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        """Bound every entry of the gradients at the end of a window; before it do nothing."""
        parameters = _listed(parameters)
        optimizers = self._optimizers_of(parameters)
        if not clip_value >= 0:
            raise ConfigError(
                f"`clip_value={clip_value}` is no bound for an absolute value. Give a number of zero or more."
            )
        if all(optimizer.window.sync for optimizer in optimizers):
            for optimizer in optimizers:
                optimizer.unscale_()
            self.strategy.clip_grad_value_(parameters, clip_value)

    def rewind(self, loader: StatefulLoader[Any]) -> int:
        """Batches of `loader` that a run resumed from now must see again: those of windows that are not finished."""
        return max((self.loops.num_fed(w, loader) for w in self.accumulation.windows if w.unfinished), default=0)

    def restart(self) -> None:
        """Give up unfinished windows and their gradients: another state was restored, which has none."""
        self.accumulation.restart()
        self.loops.forget()
        for optimizer in self.optimizers:
            self.strategy.zero_grad(optimizer.optimizer)

    def forget(self) -> None:
        """Let go of everything that was prepared."""
        plugin = self.accumulation.plugin
        for held in (self.models, self.optimizers, self.schedulers, self._tables):
            held.clear()
        self._windows_of_model.clear()
        self._wrapped.clear()
        self._fused, self._is_special = None, self._scales
        self.strategy.release()
        self.loops.forget()
        self.accumulation = Accumulation(plugin, self.strategy)

    def _tell_changes(self, before: Mapping[str, torch.dtype], model: nn.Module) -> None:
        changed = changed_dtypes(before, model)
        if changed:
            name, (given, now) = next(iter(changed.items()))
            logger.warning(
                "`prepare` changed the dtype of %d of %d tensors of the %s, such as `%s` from %s to %s, as the "
                "strategy `%s` needs. `explain` prints all.",
                len(changed),
                len(before),
                type(model).__name__,
                name,
                given,
                now,
                self.strategy.name,
            )

    def _bind(self, optimizer: Optimizer, given: Optimizer) -> PreparedOptimizer:
        window = self.accumulation.bind(self.strategy.trained_parameters(optimizer))
        kind = FusedOptimizer if steps_in_backward(optimizer) else PreparedOptimizer
        scaler = self.precision.scaler if self._scales else NoScaler()
        prepared = kind(optimizer, window=window, strategy=self.strategy, scaler=scaler, given=given)
        if isinstance(prepared, FusedOptimizer):
            self._fused, self._is_special = prepared, True
        self.optimizers.append(prepared)
        return prepared

    def _find_windows(self, model: nn.Module) -> tuple[Window, ...]:
        """The windows of the optimizers that train this model; none for a model that nobody trains."""
        ours = {id(parameter) for parameter in model.parameters()}
        return tuple(
            optimizer.window
            for optimizer in self.optimizers
            if any(id(parameter) in ours for parameter in optimizer.window.parameters)
        )

    def _windows(self, models: tuple[nn.Module, ...]) -> Sequence[Window] | None:
        known = self._windows_of_model
        for model in models:
            if id(model) not in known:
                raise ConfigError(
                    f"`accumulate` was given a {type(model).__name__} that is not prepared, so no optimizer step "
                    "belongs to "
                    f"it. Pass what `prepare` returned."
                )
        if len(models) == 1:
            return known[id(models[0])] or None
        return list(dict.fromkeys(window for model in models for window in known[id(model)])) or None

    def _optimizers_of(self, parameters: list[torch.Tensor]) -> list[PreparedOptimizer]:
        wanted = {id(parameter) for parameter in parameters}
        found = [each for each in self.optimizers if any(id(p) in wanted for p in each.window.parameters)]
        if not found and self.optimizers:
            raise ConfigError(
                f"The {len(parameters)} parameters to clip belong to no prepared optimizer, so clipping them would "
                "change "
                f"no step. Pass the parameters of the model that `prepare` returned."
            )
        if self._fused is not None and self._fused in found:
            self._fused.refuse_clip()
        return found

    def _current_scale(self) -> torch.Tensor:
        return self.precision.scaler.scale(torch.ones((), device=self.models[0].parameters().__next__().device))


def refuse_inside(engine: Engine, what: str) -> None:
    """Refuse `what`, which needs all ranks, where some may be through."""
    if engine.joining:
        raise ConfigError(
            f"`{what}` was called inside `join_uneven_inputs`, and it needs all ranks, but one that has run out of "
            f"batches takes part in nothing except the exchange of gradients. Call it after the block, or train with "
            f"`even_batches=True`, where every rank has as many batches and the block is not needed."
        )


def refuse_saving(engine: Engine) -> None:
    """Refuse to save what is not the state of all ranks, or would not come back."""
    if any(window.local for window in engine.accumulation.windows):
        raise ConfigError(
            "`save_state` was called inside `LocalSGD`, where each rank has parameters of its own since the last "
            "average, and those of one would pass for all. Call it after the block, and enter another one to go on."
        )
    for optimizer in engine.optimizers:
        if isinstance(optimizer, FusedOptimizer):
            optimizer.refuse_lost_state()


class _Quiet:
    """A micro-batch during which some models keep their gradients to themselves."""

    __slots__ = ("_contexts", "_scope")

    def __init__(self, scope: Scope, contexts: list[AbstractContextManager[Any]]) -> None:
        self._scope = scope
        self._contexts = contexts

    def __enter__(self) -> None:
        self._scope.__enter__()
        for context in self._contexts:
            context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for context in reversed(self._contexts):
            context.__exit__(kind, error, traceback)
        self._scope.__exit__(kind, error, traceback)


def _refuse_prepared(objects: Sequence[Any], kind: type) -> None:
    for each in objects:
        if isinstance(each, kind):
            raise ConfigError(
                f"`prepare` was given {each!r}, which is prepared already, and wrapping it again would count its steps "
                f"twice. Call `prepare` once for each object, and use what it returned."
            )


def _listed(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
