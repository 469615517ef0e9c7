"""Optimizers of other packages that do more than step: without schedules, and inside backward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError
from accel_state.process import Process, ProcessSettings
from accel_state.testing import run_ranks

schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed here")
lomo_optim = pytest.importorskip("lomo_optim", reason="lomo-optim is not installed here")

CPU = ProcessSettings(device="cpu")
STEPS, SAVED_AT = 8, 5
NAMES = ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"]


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one on one thread, closed afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if Process.is_open():
        Process.current().close()


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def rows(step: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(20 * step + rank), dtype=torch.float64)


def loss_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    errors: torch.Tensor = (model(inputs) - 1).square().mean()
    return errors


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def train(name: str, folder: str, resume: bool, saves_in_eval: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """On a rank: parameters as they train and as they are evaluated after all steps, or the later ones of them."""
    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer: Any = getattr(schedulefree, name)(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state(folder)
    for step in range(SAVED_AT if resume else 0, STEPS):
        optimizer.train()
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, rows(step, accelerator.process_index)))
        optimizer.step()
        if step == SAVED_AT - 1:
            if saves_in_eval:
                optimizer.eval()
            accelerator.save_state(folder)
    training = parameters(model)
    optimizer.eval()
    return training, parameters(model)


def by_hand(name: str, world: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    model = network()
    optimizer: Any = getattr(schedulefree, name)(model.parameters(), lr=0.05)
    optimizer.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, torch.cat([rows(step, rank) for rank in range(world)])).backward()
        optimizer.step()
    training = parameters(model)
    optimizer.eval()
    return training, parameters(model)


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("saves_in_eval", [False, True], ids=["saved in training", "saved in evaluation"])
def test_schedule_free_optimizers_train_resume_and_evaluate_as_by_hand(
    name: str, world: int, saves_in_eval: bool, tmp_path: Path
) -> None:
    training, evaluated = by_hand(name, world)
    assert not any(torch.equal(one, other) for one, other in zip(training, evaluated, strict=True))
    for resume in (False, True):
        for found in run_ranks(train, world, name, str(tmp_path / "saved"), resume, saves_in_eval, settings=CPU):
            assert_near(found[0], training)
            assert_near(found[1], evaluated)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_the_mode_of_evaluation_is_refused_by_the_optimizer(name: str, alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, getattr(schedulefree, name)(model.parameters()))
    accelerator.backward(loss_of(model, rows(0, 0)))
    before = parameters(model)
    with pytest.raises(Exception, match="not in train mode"):  # the package raises no class of its own
        optimizer.step()
    assert optimizer.steps_taken == 0
    assert all(torch.equal(one, other) for one, other in zip(before, parameters(model), strict=True))


def test_an_optimizer_that_torch_would_not_know_is_refused(alone: None) -> None:
    model = network()
    wrapped = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match=r"a ScheduleFreeWrapper.*is no `torch.optim.Optimizer`.*AdamWScheduleFree"):
        Accelerator(cpu=True).prepare(model, wrapped)


def test_lomo_trains_as_plain_gradient_descent(alone: None, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, wanted = network(), network()
    lomo = lomo_optim.Lomo(model, lr=0.1)
    model, optimizer, schedule = accelerator.prepare(model, lomo, torch.optim.lr_scheduler.StepLR(lomo, 2, gamma=0.5))
    descent = torch.optim.SGD(wanted.parameters(), lr=0.1)
    following = torch.optim.lr_scheduler.StepLR(descent, 2, gamma=0.5)
    for step in range(5):
        accelerator.backward(loss_of(model, rows(step, 0)))
        optimizer.step()
        schedule.step()
        descent.zero_grad()
        loss_of(wanted, rows(step, 0)).backward()
        descent.step()
        following.step()
    assert_near(parameters(model), parameters(wanted), 1e-6)  # it computes in float32
    assert optimizer.steps_taken == 5
    accelerator.save_state(tmp_path / "saved")


def test_lomo_clips_by_its_own_means(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    model, wanted = network(), network()
    model, optimizer = accelerator.prepare(model, lomo_optim.Lomo(model, lr=0.1, clip_grad_norm=0.05))
    loss = loss_of(model, rows(0, 0))
    optimizer.grad_norm(loss)
    accelerator.lomo_backward(loss, learning_rate=0.1)
    loss_of(wanted, rows(0, 0)).backward()
    assert nn.utils.clip_grad_norm_(wanted.parameters(), 0.05) > 0.05
    torch.optim.SGD(wanted.parameters(), lr=0.1).step()
    assert_near(parameters(model), parameters(wanted), 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="AdaLomo makes its state on a GPU")
def test_a_state_that_would_be_lost_is_not_saved(alone: None, tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = network().float()
    accelerator.prepare(model, lomo_optim.AdaLomo(model))
    with pytest.raises(ConfigError, match=r"AdaLomo keeps tensors in `exp_avg_sq"):
        accelerator.save_state(tmp_path / "saved")
