"""The optimizer and the scheduler that a training loop holds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from accel_parallel import (
    Accumulation,
    Bundle,
    GradientAccumulationPlugin,
    PreparedOptimizer,
    PreparedScheduler,
    select_strategy,
    strategy_class,
)
from accel_state import ConfigError, Process, ProcessSettings
from accel_state.testing import run_ranks


class Scaler:
    """Skips the steps that it is told to skip."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.finite = True
        self.unscaled = 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale_(self, optimizer: Optimizer, gradients: Iterable[torch.Tensor]) -> None:
        self.unscaled += len(list(gradients))

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> bool:
        if self.finite:
            step()
        return self.finite

    def update(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Run:
    """One prepared model and optimizer on this process."""

    def __init__(self, num_steps: int = 1, *, make: Any = SGD, scaler: Scaler | None = None, **kwargs: Any) -> None:
        with_process = Process.open(ProcessSettings(device="cpu"))
        strategy = strategy_class(select_strategy(world_size=with_process.topology.world_size))(with_process)
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)
        self.inner = make(self.model.parameters(), **{"lr": 1.0, **kwargs})
        bundle = strategy.prepare(Bundle((self.model,), (self.inner,)))
        self.wrapped = bundle.models[0]
        self.accumulation = Accumulation(GradientAccumulationPlugin(num_steps=num_steps), strategy)
        window = self.accumulation.bind(self.model.parameters())
        scaler = scaler or Scaler(enabled=False)
        self.optimizer = PreparedOptimizer(self.inner, window=window, strategy=strategy, scaler=scaler)
        self.strategy = strategy

    def backward(self) -> None:
        self.strategy.backward(self.accumulation.scale_loss(self.wrapped(torch.ones(1, 2)).sum()))
        self.accumulation.after_backward()

    def bias_grad(self) -> float | None:
        return None if self.model.bias.grad is None else self.model.bias.grad.item()


@pytest.fixture(autouse=True)
def _process() -> Any:
    with Process.open(ProcessSettings(device="cpu")):
        yield


def test_zero_grad_before_backward_keeps_the_earlier_micro_batches() -> None:
    run = Run(3)
    before = run.model.bias.item()
    for index in range(3):
        with run.accumulation.enter(None, None):
            run.optimizer.zero_grad()
            run.backward()
            assert run.bias_grad() == pytest.approx((index + 1) / 3)
            run.optimizer.step()
            assert run.optimizer.steps_taken == (index == 2)
    assert run.model.bias.item() == pytest.approx(before - 1.0)
    run.optimizer.zero_grad()
    assert run.bias_grad() is None


def test_zero_grad_after_step_keeps_them_too() -> None:
    run = Run(2)
    for _ in range(4):
        with run.accumulation.enter(None, None):
            run.backward()
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=False)
    assert run.optimizer.steps_taken == 2
    assert run.bias_grad() == 0.0


def test_zero_grad_at_the_end_without_a_step_discards_the_window() -> None:
    run = Run(2)
    for _ in range(2):
        with run.accumulation.enter(None, None):
            run.backward()
    run.optimizer.zero_grad()
    assert run.bias_grad() is None
    assert run.accumulation.between_windows


def test_zero_grad_in_the_next_window_clears_one_that_nobody_stepped() -> None:
    run = Run(2)
    for index in range(3):
        with run.accumulation.enter(None, None):
            run.optimizer.zero_grad()
            run.backward()
            assert run.bias_grad() == pytest.approx((0.5, 1.0, 0.5)[index])


def test_it_is_an_optimizer_of_the_same_groups_and_state() -> None:
    run = Run(make=AdamW)
    optimizer = run.optimizer
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is run.inner.param_groups
    assert optimizer.state is run.inner.state
    assert optimizer.defaults is run.inner.defaults
    run.backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"] == run.inner.state_dict()["param_groups"]
    optimizer.load_state_dict(saved)
    optimizer.param_groups = [*run.inner.param_groups]
    assert optimizer.param_groups is run.inner.param_groups
    assert repr(optimizer).startswith("Prepared(AdamW")
    with pytest.raises(AttributeError, match="nothing"):
        optimizer.nothing  # noqa: B018


def test_parameter_groups_keep_their_settings() -> None:
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.25
    before = run.model.bias.item()
    run.backward()
    run.optimizer.step()
    assert run.model.bias.item() == pytest.approx(before - 0.25)
    with pytest.raises(ConfigError, match="with 1 entries was added after `prepare`"):
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_hooks_see_steps_that_are_taken() -> None:
    run = Run(2)
    seen: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(4):
        with run.accumulation.enter(None, None):
            run.backward()
            run.optimizer.step()
    assert seen == ["before", "after"] * 2


def test_a_skipped_step_is_reported_and_changes_nothing() -> None:
    scaler = Scaler()
    run = Run(scaler=scaler)
    scheduler = PreparedScheduler(StepLR(run.inner, 1, gamma=0.1), optimizers=[run.optimizer])
    for finite in (True, False, True):
        scaler.finite = finite
        before = run.model.bias.item()
        run.optimizer.zero_grad()
        run.backward()
        run.optimizer.unscale_()
        run.optimizer.step()
        scheduler.step()
        assert run.optimizer.step_was_skipped is not finite
        assert (run.model.bias.item() == before) is not finite
        assert run.accumulation.between_windows
    assert run.optimizer.steps_taken == 2
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert scaler.unscaled == 2 * 2 * 3


def test_a_closure_is_called_or_refused() -> None:
    run = Run(make=torch.optim.LBFGS, max_iter=3)

    def closure() -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = (run.model(torch.ones(1, 2)) ** 2).sum()
        run.strategy.backward(run.accumulation.scale_loss(loss))
        run.accumulation.after_backward()
        return loss

    run.optimizer.step(closure)
    assert run.model(torch.ones(1, 2)).item() == pytest.approx(0.0, abs=1e-4)
    run.optimizer._scaler = Scaler()
    with pytest.raises(ConfigError, match="under float16 loss scaling"):
        run.optimizer.step(closure)


def test_a_closure_in_a_window_of_several_is_refused() -> None:
    run = Run(2)
    for _ in range(2):
        with run.accumulation.enter(None, None), pytest.raises(ConfigError, match="knows nothing of the earlier ones"):
            run.optimizer.step(lambda: 0.0)


def test_schedule_free_optimizers_are_told_the_mode() -> None:
    run = Run()
    run.optimizer.train()
    run.optimizer.eval()  # nothing to tell
    told: list[str] = []
    run.inner.train = lambda: told.append("train")
    run.inner.eval = lambda: told.append("eval")
    run.optimizer.train()
    run.optimizer.eval()
    assert told == ["train", "eval"]


def test_it_can_be_copied_and_pickled() -> None:
    run = Run(make=AdamW)
    run.backward()
    run.optimizer.step()
    for other in (copy.deepcopy(run.optimizer), copy.copy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        assert isinstance(other, PreparedOptimizer)
        assert other.steps_taken == 1
        assert other.param_groups[0]["lr"] == 1.0
        assert len(other.state) == 2
    duplicate = copy.deepcopy(run.optimizer)
    duplicate.param_groups[0]["lr"] = 5.0
    assert run.optimizer.param_groups[0]["lr"] == 1.0


def test_schedulers_are_made_before_or_after() -> None:
    run = Run(2)
    before = PreparedScheduler(StepLR(run.inner, 1, gamma=0.5), optimizers=[run.optimizer])
    after = PreparedScheduler(LambdaLR(run.optimizer, lambda count: 1 / (1 + count)), optimizers=[run.optimizer])
    for _ in range(6):
        with run.accumulation.enter(None, None):
            run.backward()
            run.optimizer.step()
            before.step()
            after.step()
            run.optimizer.zero_grad()
    assert before.scheduler.last_epoch == after.scheduler.last_epoch == 3
    assert before.last_epoch == 3
    assert before.get_last_lr() == before.scheduler.get_last_lr()
    assert repr(before).startswith("Prepared(<torch")


def test_one_cycle_finds_the_momentum_through_the_wrapper() -> None:
    run = Run(momentum=0.9)
    scheduler = OneCycleLR(run.optimizer, max_lr=1.0, total_steps=10)
    assert run.inner.param_groups[0]["momentum"] == pytest.approx(0.95)
    assert len(scheduler.get_last_lr()) == 1


def test_a_plateau_is_judged_once_an_epoch() -> None:
    run = Run()
    plateau = ReduceLROnPlateau(run.inner, factor=0.5, patience=0)
    scheduler = PreparedScheduler(plateau, optimizers=[run.optimizer])
    for metric in (1.0, 2.0, 3.0):
        for _ in range(5):
            run.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        scheduler.step(metric)
        scheduler.step(metric)  # nothing was learnt in between
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_a_scheduler_that_does_not_follow_steps_each_time() -> None:
    run = Run()
    scheduler = PreparedScheduler(StepLR(run.inner, 1), optimizers=[run.optimizer], follow=False)
    run.inner.step()  # so that torch does not warn of the order
    scheduler.step()
    scheduler.step()
    assert scheduler.last_epoch == 2


def test_a_restored_scheduler_waits_for_the_next_step() -> None:
    run = Run()
    scheduler = PreparedScheduler(StepLR(run.inner, 3), optimizers=[run.optimizer])
    run.backward()
    run.optimizer.step()
    scheduler.step()
    state = copy.deepcopy(scheduler.state_dict())

    other = Run()
    restored = PreparedScheduler(StepLR(other.inner, 3), optimizers=[other.optimizer])
    other.optimizer.steps_taken = run.optimizer.steps_taken
    restored.load_state_dict(state)
    restored.settle()
    restored.step()
    assert restored.last_epoch == 1
    other.backward()
    other.optimizer.step()
    restored.step()
    assert restored.last_epoch == 2
    assert copy.deepcopy(restored).last_epoch == 2
    with pytest.raises(AttributeError, match="nothing"):
        restored.nothing  # noqa: B018


def schedule(steps: int) -> list[float]:
    run = Run(2)
    scheduler = PreparedScheduler(StepLR(run.inner, 2, gamma=0.5), optimizers=[run.optimizer])
    rates = []
    for _ in range(2 * steps):
        with run.accumulation.enter(None, None):
            run.backward()
            run.optimizer.step()
            scheduler.step()
            run.optimizer.zero_grad()
            rates.append(run.optimizer.param_groups[0]["lr"])
    return rates


def test_the_schedule_does_not_depend_on_the_world_size() -> None:
    alone = schedule(5)
    assert alone == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert run_ranks(schedule, 2, 5) == [alone, alone]
