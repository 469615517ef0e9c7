"""`LocalSGD`: steps on each rank's own gradients and averaged parameters, equal to the same written by hand."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError, GradScalerKwargs
from accel.local_sgd import LocalSGD
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

AFTER = 3
"""Steps with averaged gradients that follow the block."""
CPU = ProcessSettings(device="cpu")


class Net(nn.Module):
    """With running statistics, a constant buffer and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)  # a bias before a normalization has only noise as gradient
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)
        self.register_buffer("constant", torch.tensor([0.1, 0.7, 1 / 3]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.last(torch.tanh(self.norm(self.frozen(self.first(inputs)))))
        return hidden


def network() -> Net:
    torch.manual_seed(4)
    return Net().double()


def rows(step: int, rank: int) -> tuple[torch.Tensor, int]:
    """Inputs, and how many of their rows count as items."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64), 1 + (step + 2 * rank) % 4


def loss_of(model: nn.Module, step: int, rank: int, by_items: bool) -> tuple[torch.Tensor, int]:
    inputs, num_items = rows(step, rank)
    errors = (model(inputs) - 1).square()
    return (errors[:num_items].sum() if by_items else errors.mean()), num_items


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(steps: int, every: int, window: int, by_items: bool, max_norm: float | None) -> dict[str, Any]:
    """On a rank: micro-batches in a block, then some outside."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    model = network()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    raw = accelerator.unwrap_model(model)

    def one(step: int) -> None:
        loss, num_items = loss_of(model, step, accelerator.process_index, by_items)
        accelerator.backward(loss, num_items=num_items if by_items else None)
        if max_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    inside = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=every) as local_sgd:
        for step in range(steps):
            with accelerator.accumulate(model):
                one(step)
                local_sgd.step()
            inside.append(state(raw))
    at_end = state(raw)
    for step in range(100, 100 + AFTER * window):
        with accelerator.accumulate(model):
            one(step)
    return {"inside": inside, "at end": at_end, "after": state(raw), "lr": schedule.get_last_lr()}


def by_hand(
    world: int, steps: int, every: int, window: int, by_items: bool, max_norm: float | None
) -> list[dict[str, Any]]:
    """The same for all ranks, in plain torch on one process."""
    models = [network() for _ in range(world)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in models]
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2, gamma=0.7) for each in optimizers]
    inside: list[list[dict[str, torch.Tensor]]] = [[] for _ in models]
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss, _ = loss_of(model, step, rank, by_items)
            begun = step // window * window
            items = sum(rows(index, rank)[1] for index in range(begun, begun + window))
            (loss / (items if by_items else window)).backward()
            if (step + 1) % window == 0:
                finish(model, optimizer, max_norm)
                schedules[rank].step()
        if (step + 1) % (window * every) == 0:
            average(models)
        for rank, model in enumerate(models):
            inside[rank].append(state(model))
    average(models)
    at_end = [state(model) for model in models]
    for optimizer in optimizers[1:]:
        optimizer.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for index in range(AFTER):
        indices = range(100 + index * window, 100 + (index + 1) * window)
        losses = [loss_of(models[r], step, r, by_items) for step in indices for r in range(world)]
        items = sum(num_items for _, num_items in losses)
        (torch.stack([loss for loss, _ in losses]).sum() / (items if by_items else len(losses))).backward()
        gradients = [torch.stack([p.grad for p in each]).sum(0) for each in by_parameter(models)]
        for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
            for parameter, gradient in zip(trained(model), gradients, strict=True):
                parameter.grad = gradient.clone()
            finish(model, optimizer, max_norm)
            schedule.step()
    return [
        {"inside": inside[r], "at end": at_end[r], "after": state(models[r]), "lr": schedules[r].get_last_lr()}
        for r in range(world)
    ]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def by_parameter(models: list[Net]) -> list[tuple[nn.Parameter, ...]]:
    return list(zip(*(trained(model) for model in models), strict=True))


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def average(models: list[Net]) -> None:
    floating = [[b for b in model.buffers() if b.is_floating_point()] for model in models]
    for same in [*by_parameter(models), *zip(*floating, strict=True)]:
        mean = torch.stack([each.detach() for each in same]).mean(dim=0)
        for each in same:
            each.copy_(mean)


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, buffers: bool = True) -> None:
    for name in wanted:
        if buffers or not name.startswith("norm.running"):
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("world", "steps", "every", "window", "by_items", "max_norm"),
    [
        (2, 7, 3, 1, False, None),
        (3, 4, 2, 1, False, None),
        (2, 8, 2, 2, False, 0.1),
        (2, 8, 2, 2, True, None),
        (2, 3, 5, 1, True, 0.1),
    ],
    ids=["with a rest", "three ranks", "windows, clipped", "items in windows", "only at the end"],
)
def test_local_steps_and_averages_equal_those_by_hand(
    world: int, steps: int, every: int, window: int, by_items: bool, max_norm: float | None
) -> None:
    settings = (steps, every, window, by_items, max_norm)
    for found, wanted in zip(run_ranks(train, world, *settings, settings=CPU), by_hand(world, *settings), strict=True):
        for ours, theirs in zip(found["inside"], wanted["inside"], strict=True):
            assert_near(ours, theirs)
        assert_near(found["at end"], wanted["at end"])
        assert_near(found["after"], wanted["after"], buffers=False)  # DDP sends rank 0's, which by hand stay apart
        assert found["lr"] == wanted["lr"]


def alone_or_off(enabled: bool, factor: int) -> list[torch.Tensor]:
    """On a rank: parameters after steps in a block that does nothing."""
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained(model), lr=0.1))
    with LocalSGD(accelerator, model=model, local_sgd_steps=2, enabled=enabled) as local_sgd:
        assert local_sgd.enabled == (enabled and accelerator.num_processes > 1)
        for step in range(3):
            accelerator.backward(loss_of(model, step, accelerator.process_index * factor, False)[0])
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
        assert local_sgd.steps_taken == 3
    return [parameter.detach() for parameter in trained(model)]


def test_one_process_and_a_block_that_is_turned_off_train_as_ever() -> None:
    (expected,) = run_ranks(alone_or_off, 1, False, 0, settings=CPU)
    (found,) = run_ranks(alone_or_off, 1, True, 0, settings=CPU)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for rank in run_ranks(alone_or_off, 2, False, 1, settings=CPU):
        assert not any(torch.equal(one, other) for one, other in zip(rank, expected, strict=True))
    first, second = run_ranks(alone_or_off, 2, False, 1, settings=CPU)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def scaled() -> dict[str, Any]:
    """On a rank: float16 steps in a block, of which one overflows on rank 1 alone, then one outside."""
    scaling = GradScalerKwargs(init_scale=64.0, growth_interval=2)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[scaling])
    model = nn.Linear(3, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    scaler = accelerator._engine.precision.scaler
    before = scaler.reduce_found_inf
    skipped, scales = [], []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=4) as local_sgd:
        for step in range(5):
            overflows = step == 2 and accelerator.process_index == 1
            accelerator.backward(model(torch.ones(1, 3)).sum() * (float("inf") if overflows else 1.0))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            local_sgd.step()
            skipped.append(optimizer.step_was_skipped)
            scales.append(scaler.state_dict()["scale"])
    assert scaler.reduce_found_inf is before
    return {"skipped": skipped, "scales": scales, "lr": schedule.get_last_lr(), "steps": optimizer.steps_taken}


def test_a_step_is_skipped_on_all_ranks_or_on_none() -> None:
    expected = {
        "skipped": [False, False, True, False, False],
        "scales": [64.0, 64.0, 128.0, 64.0, 64.0],
        "lr": [0.1 * 0.5**4],
        "steps": 4,
    }
    assert run_ranks(scaled, 2, settings=CPU) == [expected] * 2


class ScheduleFree(torch.optim.SGD):
    """Has the two modes of an optimizer without schedules."""

    def train(self) -> None: ...
    def eval(self) -> None: ...


def refused() -> dict[str, str]:
    """On a rank: what each misuse is told."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    first, second, third, idle = (nn.Linear(3, 1) for _ in range(4))
    optimizers = (
        torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1),
        ScheduleFree(third.parameters(), lr=0.1),
    )
    single = nn.Linear(3, 1)
    prepared = accelerator.prepare(
        first, second, third, idle, single, *optimizers, torch.optim.SGD(single.parameters(), lr=0.1)
    )
    frozen = accelerator.prepare(nn.Linear(1, 1).requires_grad_(False))
    first, second, third, idle, single, *_, optimizer = prepared
    told: dict[str, str] = {}

    def tell(name: str, call: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            call()
        told[name] = str(caught.value)

    def block(model: nn.Module, steps: Any = 2) -> LocalSGD:
        return LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=steps)

    def micro_batch(num_items: int | None = None) -> None:
        with accelerator.accumulate(single):
            accelerator.backward(single(torch.ones(2, 3)).sum(), num_items)
            optimizer.step()
            optimizer.zero_grad()

    tell("no steps", lambda: block(single, 0))
    tell("shared optimizer", lambda: block(first))
    tell("schedule-free", lambda: block(third))
    tell("nobody trains it", lambda: block(idle))
    tell("frozen", lambda: block(frozen))
    tell("step outside", lambda: block(single).step())
    with accelerator.join_uneven_inputs([single]):
        tell("in uneven inputs", lambda: block(single).__enter__())
        micro_batch()
        tell_inside = "`LocalSGD` was called inside"
        assert tell_inside in told["in uneven inputs"]
    tell("in a window", lambda: block(single).__enter__())
    micro_batch()
    with block(single) as local_sgd:
        tell("twice", local_sgd.__enter__)
        tell("saving", lambda: accelerator.save_state("nowhere"))
        tell("exchange", lambda: accelerator.trigger_sync_in_backward(single))
        tell("uneven inputs", lambda: accelerator.join_uneven_inputs([single]).__enter__())
        for _ in range(2):
            micro_batch()
            local_sgd.step()
        assert local_sgd.steps_taken == 1
    left = block(single)
    left.__enter__()
    micro_batch(3)
    tell("left in a window", lambda: left.__exit__(None, None, None))
    return told


REFUSALS = {
    "no steps": r"`local_sgd_steps=0` is not a number of steps.*Give a positive integer",
    "shared optimizer": r"optimizer \(SGD\) also holds 2 parameters of other models.*an optimizer of its own",
    "schedule-free": r"schedule-free optimizer \(ScheduleFree\).*Use another optimizer",
    "nobody trains it": r"that no prepared optimizer trains.*Prepare its optimizer",
    "frozen": r"without anything to train",
    "step outside": r"outside its block.*Call it inside",
    "in uneven inputs": r"`LocalSGD` was called inside `join_uneven_inputs`",
    "in a window": r"inside an accumulation window that is not finished.*Enter it between windows",
    "twice": r"entered while it is open",
    "saving": r"`save_state` was called inside `LocalSGD`.*after the block",
    "exchange": r"`trigger_sync_in_backward` was given a .* that is inside `LocalSGD`",
    "uneven inputs": r"entered inside `no_sync` or `LocalSGD`.*Enter it outside",
    "left in a window": r"left inside an accumulation window whose items were counted.*Leave the block between",
}


def test_what_cannot_step_by_itself_is_refused_with_the_reason() -> None:
    for told in run_ranks(refused, 2, settings=CPU):
        assert told.keys() == REFUSALS.keys()
        for name, pattern in REFUSALS.items():
            assert re.search(pattern, told[name], re.DOTALL), (name, told[name])


def sharded() -> str:
    from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin())
    model = nn.Linear(4, 4)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="under the strategy `fsdp`") as caught:
        LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2)
    return str(caught.value)


def test_a_sharded_model_is_refused() -> None:
    for message in run_ranks(sharded, 2, settings=CPU):
        assert "divides `weight` over ranks: a rank that holds a part of a model cannot step by itself" in message


def failing() -> tuple[bool, bool]:
    """On a rank: whether gradients are exchanged, and counted over all ranks, after a block that every rank left."""
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2),
    ):
        raise RuntimeError("out of memory")
    return model.require_backward_grad_sync, optimizer.window.local


def test_an_error_in_the_block_waits_for_nobody() -> None:
    assert run_ranks(failing, 2, settings=CPU) == [(True, False)] * 2
