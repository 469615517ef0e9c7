"""Ranks that use different parameters of a sharded model are told, since their gradients are added up by place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accel_parallel import Bundle
from accel_parallel.fsdp.strategy import FSDPStrategy
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.testing import run_ranks


class Either(nn.Module):
    """Two ways through, whose gradients have the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.leave = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor, way: str) -> torch.Tensor:
        out: torch.Tensor = self.leave(self.left(rows) if way == "left" else self.right(rows))
        return out


class NoScaler:
    enabled = False


def trained(ways: list[list[str]]) -> tuple[int, str]:
    """How many steps were made, and what was said then. `ways` are those of each rank in each step."""
    process = Process.current()
    strategy = FSDPStrategy(process)
    torch.manual_seed(0)
    model = Either()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy.prepare(Bundle((model,), (optimizer,)))
    scaler: Any = NoScaler()
    for number, step in enumerate(ways):
        optimizer.zero_grad()
        strategy.backward(model(torch.ones(2, 4), step[process.topology.rank % len(step)]).sum())
        try:
            strategy.step(optimizer, scaler=scaler)
        except ConfigError as error:
            return number, str(error)
    return len(ways), "nothing"


BOTH_LEFT, BOTH_RIGHT, PARTED = ["left"], ["right"], ["left", "right"]


def test_the_first_step_with_gradients_of_different_parameters_is_not_made() -> None:
    for steps, message in run_ranks(trained, 2, [PARTED]):
        assert steps == 0
        assert message.startswith("Before step 1, `Either.left.weight` has a gradient on rank(s) 0 only (and 3 others")
        assert "find_unused_parameters=True" in message


@pytest.mark.parametrize(
    ("ways", "steps", "message"),
    [
        ([BOTH_LEFT, BOTH_RIGHT, BOTH_LEFT], 3, "nothing"),
        ([*[BOTH_LEFT] * 7, PARTED], 7, "Before step 8, `Either.left.weight`"),
        ([*[BOTH_LEFT] * 70, PARTED, *[BOTH_LEFT] * 70], 127, "In one of the last 64 steps, some parameters"),
    ],
    ids=["all change together", "later", "between two comparisons"],
)
def test_later_steps_are_looked_at_now_and_then(ways: list[list[str]], steps: int, message: str) -> None:
    for found, said in run_ranks(trained, 2, ways):
        assert found == steps
        assert said.startswith(message)
