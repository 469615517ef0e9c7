"""Invariant 3 through the `Accelerator`: a schedule advances once for each optimizer step that was really taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator, GradientAccumulationPlugin, GradScalerKwargs
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

NUM_ROWS = 60


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(num_steps: int, follow: bool) -> tuple[int, int, list[float]]:
    """On a rank: optimizer steps, schedule steps and the learning rate after each micro-batch of one epoch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=num_steps, step_scheduler_with_optimizer=follow)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = DataLoader(TensorDataset(torch.randn(NUM_ROWS, 2)), batch_size=10)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule_of(optimizer))
    rates = []
    for (inputs,) in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        rates += schedule.get_last_lr()
    return optimizer.steps_taken, schedule.scheduler.last_epoch, rates


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_one_step_of_the_schedule_for_each_optimizer_step(world: int, num_steps: int) -> None:
    micro = NUM_ROWS // 10 // world
    for taken, advanced, rates in run_ranks(train, world, num_steps, True, settings=ProcessSettings(device="cpu")):
        assert taken == advanced == -(-micro // num_steps)
        assert rates[-1] == pytest.approx(1 / (1 + taken))


def test_a_script_may_step_its_schedule_by_itself() -> None:
    ((taken, advanced, _),) = run_ranks(train, 1, 3, False, settings=ProcessSettings(device="cpu"))
    assert (taken, advanced) == (2, 6)


def overflow(fused: bool) -> list[tuple[bool, bool, int, int, float]]:
    """On a rank: after each of four steps, of which rank 0's second one overflows, what moved."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule_of(optimizer))
    seen = []
    for step in range(4):
        bad = step == 1 and accelerator.is_main_process
        before = [parameter.clone() for parameter in model.parameters()]
        loss = model(torch.ones(3, 2)).float().mean() * (float("inf") if bad else 1.0)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        moved = any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
        seen.append(
            (
                moved,
                accelerator.optimizer_step_was_skipped,
                optimizer.steps_taken,
                schedule.scheduler.last_epoch,
                accelerator._engine.precision.scaler.get_scale(),
            )
        )
    return seen


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_an_overflow_skips_the_step_and_the_schedule_on_every_rank(world: int, fused: bool) -> None:
    for seen in run_ranks(overflow, world, fused, settings=ProcessSettings(device="cpu")):
        assert seen == [
            (True, False, 1, 1, 1024.0),
            (False, True, 1, 1, 1024.0),
            (True, False, 2, 2, 512.0),  # adapted before the next window's first loss
            (True, False, 3, 3, 512.0),
        ]


def test_a_window_may_reach_over_the_end_of_an_epoch(alone: None) -> None:
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    )
    model = nn.Linear(2, 1)
    model, optimizer, data = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(torch.randn(6, 2)))
    )
    ends = []
    for _ in range(2):
        for (inputs,) in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs).mean())
                optimizer.step()
                optimizer.zero_grad()
            ends.append(accelerator.sync_gradients)
    assert [index for index, end in enumerate(ends) if end] == [3, 7, 11]
    assert optimizer.steps_taken == 3


def test_the_window_can_be_changed_between_two(alone: None) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ends: list[bool] = []
    for index in range(5):
        if index == 2:
            accelerator.gradient_accumulation_steps = 3
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).mean())
            optimizer.step()
        ends.append(accelerator.sync_gradients)
    assert ends == [False, True, False, False, True]
    assert accelerator.gradient_accumulation_steps == 3


def test_clipping_under_loss_scaling_sees_the_true_norm(alone: None) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", gradient_accumulation_steps=2)
    model = nn.Linear(2, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    norms: list[Any] = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).sum())
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
            if accelerator.sync_gradients:
                assert model.weight.grad.norm().item() == pytest.approx(0.5, rel=1e-3)
            optimizer.step()
            optimizer.zero_grad()
    # The gradient of the sum of two weights is (1, 1); half of it is there after the first of two micro-batches.
    assert norms == pytest.approx([2**0.5 / 2, 2**0.5], rel=1e-3)


def test_clipping_values_bounds_what_the_step_uses(alone: None) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(2, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.tensor([[8.0, -0.25]])).sum())
            accelerator.clip_grad_value_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.weight.detach(), before - torch.tensor([[1.0, -0.25]]))
