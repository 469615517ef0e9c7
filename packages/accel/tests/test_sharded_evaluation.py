"""Evaluating a sharded model anywhere in a training loop changes nothing of the training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError, FullyShardedDataParallelPlugin
from accel_state.testing import run_ranks

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"reshard_after_forward": False}, {"auto_wrap_policy": "no_wrap"})


class Net(nn.Module):
    """Two blocks, and parameters that are in none of them, one with two places and columns for rows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 1)
        self.enter.weight = self.again.weight = nn.Parameter(torch.randn(4, 6).t())
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.enter(rows) + self.again(rows)
        for block in self.blocks:
            hidden = block(hidden)
        out: torch.Tensor = self.leave(hidden)
        return out


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    out: torch.Tensor = model(torch.randn(3, 4, generator=generator, dtype=torch.float64)).square().mean()
    return out


def evaluate(model: nn.Module, how: str, rank: int) -> None:
    """A forward that no backward follows."""
    modes: dict[str, AbstractContextManager[Any]] = {"no_grad": torch.no_grad(), "inference": torch.inference_mode()}
    model.train(how == "train")
    with modes.get(how, nullcontext()):
        loss_of(model, 50, rank)
    model.train()


def prepared(options: dict[str, Any]) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(**options))
    model = network()
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02))


def trained(options: dict[str, Any], how: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    accelerator, model, optimizer = prepared(options)
    rank, norms = accelerator.process_index, []
    for step in range(3):
        model.zero_grad()
        accelerator.backward(loss_of(model, step, rank))
        evaluate(model, how, rank)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        evaluate(model, how, rank)
    return norms, accelerator.strategy.full_state(model)


def trained_alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    model, norms = network(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(3):
        optimizer.zero_grad()
        (sum(loss_of(model, step, rank) for rank in range(2)) / 2).backward()  # type: ignore[union-attr]
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
    return norms, dict(model.state_dict())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", ["no_grad", "inference", "eval"])
def test_clipping_and_gradients_do_not_see_an_evaluation(options: dict[str, Any], how: str) -> None:
    norms, state = trained_alone()
    for found_norms, found in run_ranks(trained, 2, options, how):
        assert found_norms == pytest.approx(norms, rel=1e-10)
        for name, value in state.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


def stepped_after_a_forward(options: dict[str, Any], folder: Path) -> list[dict[str, torch.Tensor]]:
    accelerator, model, optimizer = prepared(options)
    rank = accelerator.process_index
    states = []
    for step in range(2):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, step, rank))
        evaluate(model, "train", rank)  # keeps what it gathered
        optimizer.step()
        states.append(accelerator.strategy.full_state(model))
    evaluate(model, "train", rank)
    accelerator.save_state(folder)
    evaluate(model, "train", rank)
    accelerator.load_state(folder)
    states.append(accelerator.strategy.full_state(model))
    return states


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_and_checkpoints_see_no_old_parameters(options: dict[str, Any], tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    wanted = []
    for step in range(2):
        optimizer.zero_grad()
        (sum(loss_of(model, step, rank) for rank in range(2)) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
        wanted.append({name: value.clone() for name, value in model.state_dict().items()})
    for states in run_ranks(stepped_after_a_forward, 2, options, tmp_path / "saved"):
        for found, expected in zip(states, [*wanted, wanted[-1]], strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


def clipped_after_a_forward() -> str:
    accelerator, model, _ = prepared({})
    accelerator.backward(loss_of(model, 0, accelerator.process_index))
    evaluate(model, "train", accelerator.process_index)
    with pytest.raises(ConfigError, match="of the 9 parameters to clip") as caught:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    return str(caught.value)


def test_clipping_gathered_copies_is_refused() -> None:
    for message in run_ranks(clipped_after_a_forward, 2):
        assert message.startswith("5 of the 9 parameters")
        assert "Clip right after `backward`" in message


def optimizer_after_a_forward() -> str:
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin())
    model = accelerator.prepare(network())
    evaluate(model, "train", accelerator.process_index)
    with pytest.raises(ConfigError, match="5 of the 9 parameters of the SGD") as caught:
        accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    evaluate(model, "eval", accelerator.process_index)
    accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    return str(caught.value)


def test_an_optimizer_of_gathered_copies_is_refused() -> None:
    for message in run_ranks(optimizer_after_a_forward, 2):
        assert "nothing would be trained. Make the optimizer before the forward" in message


def evaluated_with_statistics(plugin: FullyShardedDataParallelPlugin | None) -> list[float]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 1)).double()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for step in range(2):
        for micro in range(2):
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, 10 * step + micro, accelerator.process_index))
            optimizer.step()
        model.eval()
        found.append(loss_of(model, 50, 0).item())
        model.train()
    norm.eval()  # frozen from here on
    found.append(loss_of(model, 51, 0).item())
    return found


def test_every_rank_evaluates_with_the_statistics_of_rank_0() -> None:
    first, second = run_ranks(evaluated_with_statistics, 2, FullyShardedDataParallelPlugin())
    assert first == pytest.approx(run_ranks(evaluated_with_statistics, 2, None)[0], rel=1e-10)  # as under DDP
    assert second == pytest.approx(first, rel=1e-10)
