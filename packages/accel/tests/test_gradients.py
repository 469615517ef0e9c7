"""Invariant 2 through the `Accelerator`: each step's gradient is that of one process on the whole window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from accel import Accelerator
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

WORLDS = (1, 2, 3)
BATCH = 2
WINDOW = 3
Grads = list[list[torch.Tensor]]
"""Of each optimizer step, the gradient of each parameter."""


class Rows(IterableDataset[Any]):
    """A stream that does not say how long it is."""

    def __init__(self, *columns: torch.Tensor) -> None:
        self.columns = columns

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(*self.columns, strict=True))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def columns(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets, and how many items each row counts for: from none to many."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    return inputs, targets, torch.randint(0, 7, (num_rows, 1), generator=generator)


def loader(num_rows: int, *, stream: bool = False) -> DataLoader[Any]:
    dataset: Dataset[Any] = Rows(*columns(num_rows)) if stream else TensorDataset(*columns(num_rows))
    return DataLoader(dataset, batch_size=BATCH)


def errors(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (model(inputs) - targets) ** 2


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def train(num_rows: int, stream: bool, by_items: bool, max_norm: float | None) -> tuple[Grads, list[float]]:
    """On a rank: one epoch. Returns the gradients of each step and the norms that clipping gave."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=WINDOW)
    model = network()
    model, optimizer, data = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.05), loader(num_rows, stream=stream)
    )
    found: Grads = []
    norms: list[float] = []
    for inputs, targets, items in data:
        with accelerator.accumulate(model):
            each = errors(model, inputs, targets)
            if by_items:
                accelerator.backward((each * items).sum(), num_items=items.sum())
            else:
                accelerator.backward(each.mean())
            if max_norm is not None:
                norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
                norms += [norm.item()] if accelerator.sync_gradients else []
            if accelerator.sync_gradients:
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.steps_taken == len(found)
    return found, norms


def reference(num_rows: int, world: int, by_items: bool, max_norm: float | None) -> tuple[Grads, list[float]]:
    """The same in plain torch, on whole windows."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found: Grads = []
    norms: list[float] = []
    window = WINDOW * BATCH * world
    inputs, targets, items = columns(num_rows)
    for start in range(0, num_rows, window):
        rows = slice(start, start + window)
        optimizer.zero_grad()
        each = errors(model, inputs[rows], targets[rows])
        ((each * items[rows]).sum() / items[rows].sum() if by_items else each.mean()).backward()
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        found.append(gradients(model))
        optimizer.step()
    return found, norms


def ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    return run_ranks(function, world, *args, settings=ProcessSettings(device="cpu"))


def assert_same(found: Grads, expected: Grads) -> None:
    assert len(found) == len(expected)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, s=step: f"step {s}: {text}")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("by_items", [False, True], ids=["plain", "num_items"])
@pytest.mark.parametrize("stream", [False, True], ids=["map", "unknown length"])
def test_a_steps_gradient_is_that_of_one_process_on_its_window(world: int, by_items: bool, stream: bool) -> None:
    num_rows = BATCH * world * 7  # windows of three, three and one micro-batches
    expected, _ = reference(num_rows, world, by_items, None)
    for found, _ in ranks(train, world, num_rows, stream, by_items, None):
        assert_same(found, expected)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("by_items", [False, True], ids=["plain", "num_items"])
def test_clipping_finds_the_norm_of_one_process(world: int, by_items: bool) -> None:
    num_rows = BATCH * world * 5
    expected, norms = reference(num_rows, world, by_items, 0.1)
    assert min(norms) > 0.1  # it clips
    for found, ours in ranks(train, world, num_rows, False, by_items, 0.1):
        assert_same(found, expected)
        assert ours == pytest.approx(norms, rel=1e-10)


def train_two(num_rows: int) -> tuple[Grads, Grads]:
    """Two models: the critic is trained on every batch, the maker on every second one, so their windows differ."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    critic, maker = network(1), network(2)
    critic, maker, critic_optimizer, maker_optimizer, data = accelerator.prepare(
        critic,
        maker,
        torch.optim.SGD(critic.parameters(), lr=0.05),
        torch.optim.AdamW(maker.parameters(), lr=0.01),
        loader(num_rows),
    )
    steps: tuple[Grads, Grads] = ([], [])
    for index, (inputs, targets, items) in enumerate(data):
        with accelerator.accumulate(critic):
            accelerator.backward(errors(critic, inputs, targets).mean())
            if accelerator.sync_gradients:
                steps[0].append(gradients(critic))
            critic_optimizer.step()
            critic_optimizer.zero_grad()
        if index % 2:
            with accelerator.accumulate(maker):
                each = errors(maker, inputs, targets) * items
                accelerator.backward(each.sum(), num_items=items.sum())
                if accelerator.sync_gradients:
                    steps[1].append(gradients(maker))
                maker_optimizer.step()
                maker_optimizer.zero_grad()
    return steps


def reference_two(num_rows: int, world: int) -> tuple[Grads, Grads]:
    critic, maker = network(1), network(2)
    pairs = (
        (critic, torch.optim.SGD(critic.parameters(), lr=0.05)),
        (maker, torch.optim.AdamW(maker.parameters(), lr=0.01)),
    )
    inputs, targets, items = columns(num_rows)
    batches = [slice(start, start + BATCH * world) for start in range(0, num_rows, BATCH * world)]
    # The critic's windows are batches 0+1, 2+3, 4+5; the maker's are 1+3 and, shorter, 5.
    windows = ([batches[0:2], batches[2:4], batches[4:6]], [batches[1:4:2], batches[5:6]])
    steps: tuple[Grads, Grads] = ([], [])
    for index, (model, optimizer) in enumerate(pairs):
        for window in windows[index]:
            rows = torch.cat([torch.arange(num_rows)[each] for each in window])
            optimizer.zero_grad()
            each = errors(model, inputs[rows], targets[rows])
            (each.mean() if index == 0 else (each * items[rows]).sum() / items[rows].sum()).backward()
            steps[index].append(gradients(model))
            optimizer.step()
    return steps


@pytest.mark.parametrize("world", WORLDS)
def test_two_models_keep_windows_of_their_own(world: int) -> None:
    num_rows = BATCH * world * 6
    expected = reference_two(num_rows, world)
    for found in ranks(train_two, world, num_rows):
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])


def steps_of_a_zip(short: int, long: int) -> int:
    """Optimizer steps of one epoch over two loaders read in turns, in windows of two micro-batches."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first = accelerator.prepare(DataLoader(torch.ones(short * accelerator.num_processes, 1)))
    second = accelerator.prepare(DataLoader(torch.ones(long * accelerator.num_processes, 1)))
    for rows, _ in zip(first, second, strict=False):
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).sum())
            optimizer.step()
            optimizer.zero_grad()
    return int(optimizer.steps_taken)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5)])
def test_the_last_window_of_loaders_read_in_turns_is_stepped(lengths: tuple[int, int]) -> None:
    assert run_ranks(steps_of_a_zip, 2, *lengths) == [3, 3]
