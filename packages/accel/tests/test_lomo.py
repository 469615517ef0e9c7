"""Optimizers that step inside backward: what they train, what follows them, and what they cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError
from accel_state.testing import run_ranks


class Fused(torch.optim.Optimizer):
    """Plain gradient descent, a parameter at a time, as soon as its gradient is there.

    With the interface of the optimizers in ``lomo-optim``: it takes the model, and has no ``step``.
    """

    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        self.rate = lr
        self.rates: list[float] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._descend)

    @torch.no_grad()
    def _descend(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter -= self.rate * parameter.grad
        parameter.grad = None

    def fused_backward(self, loss: torch.Tensor, lr: float) -> None:
        self.rate = lr
        self.rates.append(lr)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]


class WithHiddenState(Fused):
    """Keeps tensors where ``state_dict`` does not look, as AdaLomo does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.squares = {name: torch.zeros_like(each) for name, each in model.named_parameters()}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def rows(step: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.filterwarnings("error::UserWarning")  # as of a schedule that thinks its optimizer never stepped
@pytest.mark.parametrize("how", ["backward", "rate given", "lomo_backward", "num_items", "inside accumulate"])
def test_it_trains_as_plain_gradient_descent(how: str, alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    fused = Fused(model)
    model, optimizer, schedule = accelerator.prepare(model, fused, torch.optim.lr_scheduler.StepLR(fused, 1, gamma=0.5))
    wanted = network()
    descent = torch.optim.SGD(wanted.parameters(), lr=0.1)
    for step in range(3):
        rate = 0.1 * 0.5**step
        loss = model(rows(step)).square().sum()
        if how == "backward":
            accelerator.backward(loss / 4)
        elif how == "rate given":
            accelerator.backward(loss / 4, learning_rate=rate)
        elif how == "lomo_backward":
            accelerator.lomo_backward(loss / 4, rate)
        elif how == "num_items":
            accelerator.backward(loss, num_items=4)
        else:
            with accelerator.accumulate(model):
                accelerator.backward(loss / 4)
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        descent.param_groups[0]["lr"] = rate
        descent.zero_grad()
        wanted(rows(step)).square().sum().div(4).backward()
        descent.step()
        for ours, theirs in zip(parameters(model), parameters(wanted), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert optimizer.steps_taken == 3
    assert fused.rates == pytest.approx([0.1, 0.05, 0.025])


def test_another_optimizer_beside_it_gets_its_gradients(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    body, head = network(), nn.Linear(1, 1).double()
    before = parameters(head)
    body, head, of_body, of_head = accelerator.prepare(
        body, head, Fused(body), torch.optim.SGD(head.parameters(), lr=0.1)
    )
    accelerator.backward(head(body(rows(0))).square().mean())
    assert all(parameter.grad is not None for parameter in head.parameters())
    for optimizer in (of_body, of_head):
        optimizer.step()
    assert not any(torch.equal(one, other) for one, other in zip(before, parameters(head), strict=True))


def test_a_checkpoint_takes_it_along(alone: None, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, Fused(model, lr=0.2))
    accelerator.backward(model(rows(0)).mean())
    optimizer.step()
    saved = parameters(model)
    accelerator.save_state(tmp_path / "saved")
    accelerator.backward(model(rows(1)).mean())
    accelerator.load_state(tmp_path / "saved")
    assert all(torch.equal(one, other) for one, other in zip(saved, parameters(model), strict=True))
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 2}, r"Fused steps in every backward.*`gradient_accumulation_steps=2`.*to 1"),
        ({"mixed_precision": "fp16"}, r"Fused steps parameters while backward.*Use `mixed_precision='bf16'` or 'no'"),
    ],
)
def test_settings_that_it_cannot_follow(settings: dict[str, Any], message: str, alone: None) -> None:
    model = network().float()
    with pytest.raises(ConfigError, match=message):
        Accelerator(cpu=True, **settings).prepare(model, Fused(model))


def several() -> str:
    model = network()
    with pytest.raises(ConfigError, match=r"Fused steps each parameter inside backward") as caught:
        Accelerator(cpu=True).prepare(model, Fused(model))
    return str(caught.value)


def test_several_processes_are_refused() -> None:
    for message in run_ranks(several, 2):
        assert "exchanged between 2 processes" in message
        assert "Train on one process" in message


def test_two_of_them_are_refused(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    first, second = network(), network()
    accelerator.prepare(first, Fused(first))
    with pytest.raises(ConfigError, match="Fused and Fused both run backward by themselves"):
        accelerator.prepare(second, Fused(second))
    accelerator.free_memory()
    accelerator.prepare(second, Fused(second))


def test_what_has_no_meaning_is_refused(alone: None, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, WithHiddenState(model))
    loss = model(rows(0)).mean()
    with pytest.raises(ConfigError, match=r"given retain_graph, and WithHiddenState runs backward by itself"):
        accelerator.backward(loss, retain_graph=True)
    with (
        accelerator.accumulate(model, num_steps=3),
        pytest.raises(ConfigError, match=r"a window of 3 micro-batches cannot add any up"),
    ):
        accelerator.backward(loss)
    for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
        with pytest.raises(ConfigError, match=r"WithHiddenState are gone when backward.*its own `clip_grad_norm`"):
            clip(model.parameters(), 1.0)
    with pytest.raises(ConfigError, match=r"`step\(closure\)` was called for WithHiddenState"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ConfigError, match=r"keeps tensors in `squares`, which is not part of its `state_dict`"):
        accelerator.save_state(tmp_path / "saved")


def test_a_call_for_it_where_there_is_none(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="no prepared optimizer steps inside backward"):
        accelerator.lomo_backward(model(rows(0)).mean(), 0.1)
