"""`trigger_sync_in_backward`: forwards that kept their gradients, and a backward that exchanges all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accel import Accelerator
from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
from accel_parallel.sharded import whole
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

WINDOW = 4


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def rows(index: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(50 * index + rank), dtype=torch.float64)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [whole(parameter.grad).clone() for parameter in model.parameters() if parameter.grad is not None]


def start(num_steps: int, sharded: bool) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin() if sharded else None
    return Accelerator(cpu=True, gradient_accumulation_steps=num_steps, fsdp_plugin=plugin)


def two_forwards_one_exchange(sharded: bool) -> list[list[torch.Tensor]]:
    """On a rank: gradients after each of two backwards whose forwards were both inside `no_sync`."""
    accelerator = start(1, sharded)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.no_sync(model):
        losses = [model(rows(index, accelerator.process_index)).square().mean() for index in range(2)]
    with accelerator.no_sync(model):
        accelerator.backward(losses[0])
    found = [[] if sharded else gradients(model)]  # torch keeps whole gradients of sharded models aside
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(losses[1])
    found.append(gradients(model))
    optimizer.step()
    return found


def in_a_window(early: int, sharded: bool) -> list[list[torch.Tensor]]:
    """On a rank: gradients after the micro-batch in which an exchange was asked for, and at the end of the window."""
    accelerator = start(WINDOW, sharded)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for index in range(WINDOW):
        with accelerator.accumulate(model):
            loss = model(rows(index, accelerator.process_index)).square().mean()
            if index == early:
                with accelerator.trigger_sync_in_backward(model):
                    accelerator.backward(loss)
            else:
                accelerator.backward(loss)
            if index in (early, WINDOW - 1):
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    return found


def expected(indices: list[int], ranks: list[int], divisor: int) -> list[torch.Tensor]:
    model = network()
    for index in indices:
        for rank in ranks:
            (model(rows(index, rank)).square().mean() / divisor).backward()
    return gradients(model)


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("world", "sharded"), [(1, False), (2, False), (3, False), (2, True)])
def test_the_last_of_several_backwards_exchanges_their_sum(world: int, sharded: bool) -> None:
    results = run_ranks(two_forwards_one_exchange, world, sharded, settings=ProcessSettings(device="cpu"))
    for rank, (local, summed) in enumerate(results):
        if not sharded:
            assert_near(local, expected([0], [rank], 1))
        assert_near(summed, expected([0, 1], list(range(world)), world))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("early", [0, 2])
def test_an_exchange_within_a_window_changes_nothing_at_its_end(early: int, sharded: bool) -> None:
    results = run_ranks(in_a_window, 2, early, sharded, settings=ProcessSettings(device="cpu"))
    for within, at_end in results:
        assert_near(within, expected(list(range(early + 1)), [0, 1], 2 * WINDOW))
        assert_near(at_end, expected(list(range(WINDOW)), [0, 1], 2 * WINDOW))
