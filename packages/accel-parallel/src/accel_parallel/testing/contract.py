"""The contract itself: what each rank does with a strategy, and what must come out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from accel_parallel.accumulation import Accumulation
from accel_parallel.optimizer import PreparedOptimizer
from accel_parallel.parallelism import ParallelismConfig
from accel_parallel.plugins import GradientAccumulationPlugin
from accel_parallel.scheduler import PreparedScheduler
from accel_parallel.select import strategy_class
from accel_parallel.sharded import local_of
from accel_parallel.strategy import Bundle, Duty, Strategy
from accel_parallel.testing.reference import MAX_NORM, Step, Trace, reference_trace
from accel_parallel.testing.scenarios import SCENARIOS, Scenario, batch, build, loss_of, taking_part
from accel_parallel.testing.states import ReadGradients, demand, state_failures, whole_gradients
from accel_state.process import Process, ProcessSettings
from accel_state.testing import run_ranks
from accel_state.topology import Topology

__all__ = ["TOLERANCES", "ReadGradients", "check_contract", "contract_states", "contract_trace", "whole_gradients"]

TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 2e-4}
"""Largest absolute difference from plain torch. In float32 a gradient near zero may turn its sign by rounding alone,
and AdamW then moves by a part of the learning rate, 0.02, the other way."""


def check_contract(
    strategy_name: str,
    *,
    world_sizes: Iterable[int] = (1, 2, 3),
    scenarios: Sequence[Scenario] = SCENARIOS,
    dtype: torch.dtype = torch.float64,
    options: Any = None,
    gradients: ReadGradients | None = None,
    parallelism: ParallelismConfig | None = None,
    timeout_s: float = 100.0,
) -> None:
    """Train on real processes of several world sizes, and compare everything with plain torch on one.

    Args:
        strategy_name: as `select.strategy_class` knows it.
        world_sizes: numbers of processes to try.
        scenarios: ways of accumulating to try.
        dtype: of the models; ``TOLERANCES`` says how exact each has to be.
        options: of the strategy.
        gradients: reads a model's gradients, for a strategy that keeps them elsewhere than in ``grad``. Defined at the
            top level of a module that can be imported.
        parallelism: how to divide a world, whose size it gives instead of `world_sizes`. Ranks that share a sample see
            the same data.
        timeout_s: for all scenarios in one world.

    Raises:
        AssertionError: naming the world size, the scenario, the rank and what differs.
    """
    mesh = None if parallelism is None else parallelism.mesh_shape()
    settings = ProcessSettings(device="cpu", timeout_s=timeout_s, mesh=mesh)
    for world_size in world_sizes if mesh is None else [mesh.size]:
        of_ranks = run_ranks(
            contract_trace, world_size, strategy_name, scenarios, dtype, options, gradients, parallelism,
            timeout_s=timeout_s, settings=settings,
        )  # fmt: skip
        topology = Topology(world_size=world_size, mesh=mesh)
        for scenario in scenarios:
            if any(scenario.name not in traces for traces in of_ranks):
                continue
            expected = reference_trace(scenario, world_size=topology.data_world_size, dtype=dtype)
            for rank, traces in enumerate(of_ranks):
                place = f"`{strategy_name}`, {world_size} process(es), {scenario.name}, rank {rank}"
                _compare(place, traces[scenario.name], expected[topology.at(rank).data_rank], TOLERANCES[dtype])
        of_states = run_ranks(
            contract_states, world_size, strategy_name, dtype, options, parallelism, gradients,
            timeout_s=timeout_s, settings=settings,
        )  # fmt: skip
        for rank, failures in enumerate(of_states):
            demand(not failures, f"`{strategy_name}`, {world_size} process(es), rank {rank}: {'; '.join(failures)}")


def contract_trace(
    strategy_name: str,
    scenarios: Sequence[Scenario] = SCENARIOS,
    dtype: torch.dtype = torch.float64,
    options: Any = None,
    gradients: ReadGradients | None = None,
    parallelism: ParallelismConfig | None = None,
) -> dict[str, Trace]:
    """Train each scenario with a strategy on this rank. Every rank must call this.

    Returns:
        What happened, by name of the scenario. Those whose loss the strategy scales by itself are left out.
    """
    traces = {}
    for scenario in scenarios:
        strategy: Strategy = _make(strategy_name, options, parallelism)
        if not (scenario.poisoned and Duty.SCALE in strategy.owns):
            traces[scenario.name] = _Run(strategy, scenario, dtype, gradients or whole_gradients).train()
    return traces


def contract_states(
    strategy_name: str,
    dtype: torch.dtype = torch.float64,
    options: Any = None,
    parallelism: ParallelismConfig | None = None,
    gradients: ReadGradients | None = None,
) -> list[str]:
    """Save, restore, unwrap and train without exchange on this rank. Every rank must call this.

    Returns:
        What is wrong, in words.
    """
    made = partial(_make, strategy_name, options, parallelism)
    return state_failures(made, dtype, gradients=gradients or whole_gradients)


def _make(strategy_name: str, options: Any, parallelism: ParallelismConfig | None) -> Strategy:
    made: Strategy = strategy_class(strategy_name)(Process.current(), options=options, parallelism=parallelism)
    return made


class _Scaler:
    """A loss scaler as simple as can be: a constant scale, one flag. Counts nothing and never adapts."""

    def __init__(self, *, enabled: bool, reduce_found_inf: Callable[[torch.Tensor], None] | None) -> None:
        self.enabled = enabled
        self.reduce_found_inf = reduce_found_inf
        self._finite: dict[int, bool] = {}

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * 1024.0

    def unscale_(self, optimizer: Optimizer, gradients: Iterable[torch.Tensor]) -> None:
        if id(optimizer) not in self._finite:
            parts = [local_of(gradient) for gradient in gradients]
            torch._foreach_div_(parts, 1024.0)
            found = torch.tensor(float(not all(bool(part.isfinite().all()) for part in parts)))
            if self.reduce_found_inf is not None:
                self.reduce_found_inf(found)
            self._finite[id(optimizer)] = found.item() == 0.0

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> bool:
        finite = self._finite.pop(id(optimizer))
        if finite:
            step()
        return finite

    def update(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class _Run:
    """A training loop that does what an `Accelerator` does, with nothing but this package."""

    def __init__(self, strategy: Strategy, scenario: Scenario, dtype: torch.dtype, gradients: ReadGradients) -> None:
        self.strategy, self.scenario, self.gradients = strategy, scenario, gradients
        self.rank = Process.current().topology.data_rank
        plugin = GradientAccumulationPlugin(num_steps=scenario.num_steps, sync_each_batch=scenario.sync_each_batch)
        self.accumulation = Accumulation(plugin, strategy)
        self.scaler = _Scaler(enabled=bool(scenario.poisoned), reduce_found_inf=strategy.reduce_found_inf)
        models, optimizers = build(scenario.num_models, dtype)
        bundle = strategy.prepare(Bundle(tuple(models), tuple(optimizers), num_steps=scenario.num_steps))
        self.models = bundle.models
        self.optimizers = [self._bind(optimizer) for optimizer in bundle.optimizers]
        self.schedulers = [
            PreparedScheduler(
                strategy.scheduler_for(StepLR(each, step_size=4, gamma=0.5), each.optimizer), optimizers=[each]
            )
            for each in self.optimizers
        ]
        self.trace = Trace(steps=[[] for _ in self.models])

    def train(self) -> Trace:
        """All epochs."""
        scenario = self.scenario
        for epoch in range(scenario.num_epochs):
            for index in range(scenario.epoch_length):
                active = taking_part(scenario, index)
                groups = [[model] for model in active] if scenario.apart else [list(active)]
                for group in groups:
                    left = self._left(index, group)
                    with self._micro_batch(group, left if scenario.known or left == 0 else None):
                        self._train_one(group, epoch, index)
        self.trace.parameters = [
            {name: value.clone() for name, value in self.strategy.full_state(model).items()} for model in self.models
        ]
        return self.trace

    def _bind(self, optimizer: Optimizer) -> PreparedOptimizer:
        window = self.accumulation.bind(self.strategy.trained_parameters(optimizer))
        return PreparedOptimizer(optimizer, window=window, strategy=self.strategy, scaler=self.scaler)

    def _left(self, index: int, group: Sequence[int]) -> int:
        later = range(index + 1, self.scenario.epoch_length)
        return sum(group[0] in taking_part(self.scenario, number) for number in later)

    @contextmanager
    def _micro_batch(self, group: Sequence[int], remaining: int | None) -> Iterator[None]:
        windows = [self.optimizers[model].window for model in group]
        with ExitStack() as stack:
            stack.enter_context(self.accumulation.enter(windows, remaining))
            if not windows[0].sync and not self.scenario.sync_each_batch:
                for model in group:
                    stack.enter_context(self.strategy.no_sync(self.models[model]))
            yield

    def _train_one(self, group: Sequence[int], epoch: int, index: int) -> None:
        tokens, targets, num_items = batch(epoch, index, self.rank)
        counted = num_items if self.scenario.by_items else None
        for model in group:
            self.optimizers[model].zero_grad()  # here, as many do: earlier micro-batches must outlive it
        losses = [loss_of(self.models[model](tokens), targets, counted) for model in group]
        for model, loss in zip(group, losses, strict=True):
            self.trace.losses[epoch, index, model] = loss.item()
        total = torch.stack(losses).sum()
        ends = self.optimizers[group[0]].window.sync
        if ends and len(self.trace.steps[group[0]]) in self.scenario.poisoned and self.rank == 0:
            total = total * torch.inf
        self._backward(total, counted, group)
        for model in group:
            self._end(model)

    def _backward(self, loss: torch.Tensor, num_items: int | None, group: Sequence[int]) -> None:
        averages = Duty.AVERAGE not in self.strategy.owns
        if averages:
            loss = self.accumulation.scale_loss(loss, num_items)
        if self.scaler.enabled:
            loss = self.scaler.scale(loss)
        self.strategy.backward(loss)
        if averages:
            self.accumulation.after_backward()

    def _end(self, model: int) -> None:
        optimizer, steps = self.optimizers[model], self.trace.steps[model]
        if optimizer.window.sync:
            optimizer.unscale_()
            gradients = self.gradients(self.strategy, self.models[model])
            norm = self.strategy.clip_grad_norm_(optimizer.window.parameters, MAX_NORM).item()
            steps.append(Step(gradients, norm, optimizer.param_groups[0]["lr"], False))
        before = self.strategy.full_state(self.models[model])
        before = {name: value.clone() for name, value in before.items()}
        taken = optimizer.steps_taken
        optimizer.step()
        self.schedulers[model].step()
        if optimizer.window.sync:
            steps[-1].skipped = optimizer.step_was_skipped
        if optimizer.steps_taken == taken:
            after = self.strategy.full_state(self.models[model])
            demand(
                all(torch.equal(after[name], before[name]) for name in before), "a step not taken changed parameters"
            )


def _compare(place: str, found: Trace, expected: Trace, tolerance: float) -> None:
    """Raises an `AssertionError` at the first thing that differs."""

    def near(what: str, ours: float | torch.Tensor, theirs: float | torch.Tensor) -> None:
        difference = (torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max().item()
        demand(difference <= tolerance, f"{place}: {what} differs by {difference:g}")

    demand(found.losses.keys() == expected.losses.keys(), f"{place}: other micro-batches")
    for model, (ours, theirs) in enumerate(zip(found.steps, expected.steps, strict=True)):
        demand(len(ours) == len(theirs), f"{place}: model {model} took {len(ours)} steps instead of {len(theirs)}")
        for number, (step, wanted) in enumerate(zip(ours, theirs, strict=True)):
            what = f"of model {model} at step {number}"
            demand(step.skipped == wanted.skipped, f"{place}: skipped={step.skipped} {what}")
            demand(step.lr == wanted.lr, f"{place}: the learning rate {what} is {step.lr} instead of {wanted.lr}")
            if step.skipped:
                continue
            demand(step.gradients.keys() == wanted.gradients.keys(), f"{place}: other gradients {what}")
            for name, gradient in step.gradients.items():
                near(f"the gradient of `{name}` {what}", gradient, wanted.gradients[name])
            near(f"the norm {what}", step.norm, wanted.norm)
    for moment, loss in found.losses.items():
        near(f"the loss at epoch, micro-batch, model {moment}", loss, expected.losses[moment])
    for model, (state, wanted_state) in enumerate(zip(found.parameters, expected.parameters, strict=True)):
        demand(state.keys() == wanted_state.keys(), f"{place}: model {model} ends with other names")
        for name, value in state.items():
            near(f"`{name}` of model {model} at the end", value, wanted_state[name])
