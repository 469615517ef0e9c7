"""Ranks that run out of batches at different times end alike, with the values of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accel import Accelerator, DataLoaderConfiguration
from accel_state import ConfigError
from accel_state.testing import run_ranks

AFTER = 3
"""Steps that all ranks take together after the block."""
MAX_NORM = 0.5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def inputs(step: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def parts(model: nn.Module) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def train(counts: tuple[int, ...], window: int) -> dict[str, Any]:
    """On a rank: as many micro-batches as it has, then some on all ranks."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    rank = accelerator.process_index
    model = network()
    model, optimizer, scheduler = accelerator.prepare(model, *parts(model))

    def one(step: int) -> None:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs(step, rank)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    with accelerator.join_uneven_inputs([model]):
        for step in range(counts[rank]):
            one(step)
    inside = optimizer.steps_taken
    at_end = copy.deepcopy(parameters(model))
    for step in range(100, 100 + AFTER):
        one(step)
    return {
        "at end": at_end,
        "after": parameters(model),
        "steps": (inside, optimizer.steps_taken),
        "lr": scheduler.get_last_lr()[0],
        "moments": [optimizer.state[p]["exp_avg"] for p in model.parameters()],
    }


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def reference(counts: tuple[int, ...], window: int) -> dict[str, Any]:
    """One process in plain torch, whose micro-batch is what the ranks have at one moment."""
    model = network()
    optimizer, scheduler = parts(model)
    world, steps, at_end = len(counts), 0, None
    moments = [*range(max(counts)), *range(100, 100 + AFTER)]
    inside = max(counts) // window
    for start in range(0, len(moments), window):
        if start + window > len(moments):
            break
        optimizer.zero_grad()
        for step in moments[start : start + window]:
            if step == 100 and at_end is None:
                at_end = parameters(model)
            there = [rank for rank in range(world) if step >= 100 or counts[rank] > step]
            mean = torch.stack([model(inputs(step, rank)).square().mean() for rank in there]).mean()
            (mean / window).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        steps += 1
    return {
        "at end": parameters(model) if at_end is None else at_end,
        "after": parameters(model),
        "steps": (inside, steps),
        "lr": scheduler.get_last_lr()[0],
        "moments": [optimizer.state[p]["exp_avg"] for p in model.parameters()],
    }


@pytest.mark.parametrize(
    ("counts", "window"),
    [
        ((3, 5), 1),
        ((5, 2), 1),
        ((2, 5, 4), 1),
        ((4, 0), 1),
        ((6, 4), 2),
        ((7, 5), 3),
        ((2, 4, 4), 3),
        ((6, 5), 3),
        ((5, 0), 3),
        ((5,), 2),
    ],
)
def test_all_ranks_end_as_one_process_would(counts: tuple[int, ...], window: int) -> None:
    expected = reference(counts, window)
    for found in run_ranks(train, len(counts), counts, window):
        for name in ("at end", "after", "moments"):
            for ours, wanted in zip(found[name], expected[name], strict=True):
                assert torch.allclose(ours, wanted, rtol=0, atol=1e-12), name
        assert found["steps"] == expected["steps"]
        assert found["lr"] == pytest.approx(expected["lr"])


def fail_inside(accelerator: Accelerator, model: nn.Module) -> None:
    with accelerator.join_uneven_inputs([model], even_batches=False):
        raise ZeroDivisionError("division")


def by_loader(even_batches: bool | None, window: int) -> dict[str, Any]:
    """9 samples in batches of 2: over two ranks the third global batch is one rank's only, or padded."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    model = network()
    rows = torch.cat([inputs(step, 0) for step in range(5)])[:9]
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(rows, batch_size=2)
    )
    seen: list[int] = []

    def epoch() -> None:
        seen.append(0)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            seen[-1] += 1

    with accelerator.join_uneven_inputs([model], even_batches=even_batches):
        inside = None if even_batches is None else loader.even_batches
        epoch()
    found = parameters(model)
    with pytest.raises(ZeroDivisionError, match="division"):
        fail_inside(accelerator, model)
    assert loader.even_batches is True
    epoch()
    return {"seen": seen, "inside": inside, "parameters": found, "steps": optimizer.steps_taken}


@pytest.mark.parametrize("window", [1, 2])
def test_loaders_are_uneven_inside_the_block_only(window: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [inputs(number, 0) for number in range(4)] + [inputs(4, 0)[:1]]
    moments = [batches[:2], batches[2:4], batches[4:]]
    for start in range(0, 3, window):
        optimizer.zero_grad()
        micro_batches = moments[start : start + window]
        losses = [torch.stack([model(batch).square().mean() for batch in each]).mean() for each in micro_batches]
        torch.stack(losses).mean().backward()
        optimizer.step()
    found = run_ranks(by_loader, 2, False, window)
    assert [each["seen"] for each in found] == [[3, 3], [2, 3]]
    assert [each["inside"] for each in found] == [False, False]
    assert {each["steps"] for each in found} == {2 * (3 if window == 1 else 2)}
    for each in found:
        for ours, wanted in zip(each["parameters"], parameters(model), strict=True):
            assert torch.allclose(ours, wanted, rtol=0, atol=1e-12)


def test_loaders_stay_as_they_are_unless_asked() -> None:
    found = run_ranks(by_loader, 2, None, 1)
    assert [each["seen"] for each in found] == [[3, 3], [3, 3]]


def scaled(skipping: int) -> tuple[dict[str, Any], int, bool]:
    """On a rank: float16 losses, one of them not finite on the rank that goes on alone."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    model = nn.Linear(2, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with accelerator.join_uneven_inputs([model]):
        for step in range(1 + 2 * accelerator.process_index):
            optimizer.zero_grad()
            loss = model(torch.ones(1, 2)).float().mean()
            accelerator.backward(loss * (torch.inf if step == skipping else 1.0))
            optimizer.step()
    return accelerator._engine.precision.scaler.state_dict(), optimizer.steps_taken, optimizer.step_was_skipped


def test_the_loss_scale_is_that_of_the_last_rank() -> None:
    (state, steps, skipped), other = run_ranks(scaled, 2, 2)
    assert (steps, skipped) == (
        1,
        True,
    )  # the first scale is too large as well: a rank that left knows of one step only
    assert other == (state, steps, skipped)


def refusals() -> list[str]:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    row = torch.ones(1)
    calls: dict[str, Callable[[], Any]] = {
        "gather": lambda: accelerator.gather(row),
        "gather_object": lambda: accelerator.gather_object([1]),
        "gather_for_metrics": lambda: accelerator.gather_for_metrics(row),
        "reduce": lambda: accelerator.reduce(row),
        "broadcast": lambda: accelerator.broadcast(row),
        "pad_across_processes": lambda: accelerator.pad_across_processes(row),
        "wait_for_everyone": accelerator.wait_for_everyone,
        "main_process_first": lambda: accelerator.main_process_first().__enter__(),
        "local_main_process_first": lambda: accelerator.local_main_process_first().__enter__(),
        "save_state": lambda: accelerator.save_state("nowhere"),
        "load_state": lambda: accelerator.load_state("nowhere"),
        "prepare": lambda: accelerator.prepare(network()),
        "end_training": accelerator.end_training,
        "join_uneven_inputs": lambda: accelerator.join_uneven_inputs([model]).__enter__(),
    }
    with accelerator.join_uneven_inputs([model]):
        loss = model(inputs(0, accelerator.process_index)).sum()
        calls["backward(loss, num_items=...)"] = lambda: accelerator.backward(loss, num_items=2)
        for name, call in calls.items():
            with pytest.raises(ConfigError, match="one that has run out of batches takes part in nothing") as caught:
                call()
            assert str(caught.value).startswith(f"`{name}` was called inside `join_uneven_inputs`")
        with pytest.raises(ConfigError, match="Use `accumulate`"):
            accelerator.no_sync(model)
        accelerator.backward(loss)
    assert accelerator.gather(row).shape == (2,)
    return list(calls)


def test_what_needs_all_ranks_is_refused_inside() -> None:
    assert [len(names) for names in run_ranks(refusals, 2)] == [15, 15]


def refused_at_entry() -> list[str]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    messages = []
    with (
        pytest.raises(ConfigError, match="no data loader is prepared") as caught,
        accelerator.join_uneven_inputs([model], even_batches=False),
    ):
        raise AssertionError("entered")
    messages.append(str(caught.value))
    with accelerator.accumulate(model):
        accelerator.backward(model(inputs(0, 0)).sum())
    with (
        pytest.raises(ConfigError, match="window that is not finished") as caught,
        accelerator.join_uneven_inputs([model]),
    ):
        raise AssertionError("entered")
    return [*messages, str(caught.value)]


def test_what_would_have_no_effect_or_lose_gradients_is_refused_at_entry() -> None:
    for messages in run_ranks(refused_at_entry, 2):
        assert messages[0].startswith("`even_batches=False` was given")
        assert messages[1].endswith("Enter it between windows.")


@pytest.mark.usefixtures("alone")
def test_one_process_has_nobody_to_wait_for() -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.join_uneven_inputs([model], even_batches=False):
        accelerator.backward(model(inputs(0, 0)).sum(), num_items=2)
        assert accelerator.gather(torch.ones(1)).shape == (1,)
        with torch.no_grad():
            model(inputs(0, 0))


def with_dealt_batches() -> str:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    model = network()
    model, loader = accelerator.prepare(model, DataLoader(inputs(0, 0), batch_size=1))
    with accelerator.join_uneven_inputs([model]):
        for batch in loader:
            accelerator.backward(model(batch).sum())
    with (
        pytest.raises(ConfigError, match="asks rank 0 for the next one") as caught,
        accelerator.join_uneven_inputs([model], even_batches=False),
    ):
        raise AssertionError("entered")
    return str(caught.value)


def test_uneven_batches_that_rank_0_deals_out_are_refused() -> None:
    for message in run_ranks(with_dealt_batches, 2):
        assert message.startswith("`join_uneven_inputs` was entered with `dispatch_batches=True`")
