"""Ranks that run out of inputs at different times: values, what is taken off afterwards, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from accel_parallel import (
    Bundle,
    DDPCommunicationHookType,
    DDPStrategy,
    DistributedDataParallelKwargs,
    SingleStrategy,
)
from accel_state import ConfigError, Process, ProcessSettings
from accel_state.testing import run_ranks


def inputs(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    loss: torch.Tensor = model(inputs(step, rank)).square().mean()
    return loss


def parameters(models: list[nn.Module]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


def train(
    counts: tuple[int, ...], num_models: int, options: DistributedDataParallelKwargs
) -> tuple[list[torch.Tensor], list[int]]:
    """On a rank: as many steps as it has inputs, and one more of all ranks after the block."""
    rank, strategy = Process.current().topology.rank, DDPStrategy(Process.current(), options=options)
    models = list(strategy.prepare(Bundle(tuple(network(seed) for seed in range(num_models)))).models)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    sources: list[int] = []

    def one(step: int) -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            strategy.backward(loss_of(model, step, rank))
            optimizer.step()

    filters = list(warnings.filters)
    with strategy.join(models, settle=sources.append):
        for step in range(counts[rank]):
            one(step)
    assert warnings.filters == filters
    one(99)
    for model in models[: rank == 0]:  # nobody else is asked to answer
        model.eval()
        loss_of(model, 99, 0)
    assert strategy.sum_over_data(torch.tensor([3.0 + rank])) == sum(range(3, 3 + len(counts)))
    return parameters(models), sources


def reference(counts: tuple[int, ...], num_models: int) -> list[torch.Tensor]:
    """In plain torch: each step's gradient is the mean over the ranks that have inputs."""
    models = [network(seed) for seed in range(num_models)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in [*range(max(counts)), 99]:
            there = [rank for rank, count in enumerate(counts) if step == 99 or count > step]
            optimizer.zero_grad()
            torch.stack([loss_of(model, step, rank) for rank in there]).mean().backward()
            optimizer.step()
    return parameters(models)


PLAIN = DistributedDataParallelKwargs()


@pytest.mark.parametrize(
    ("counts", "num_models", "options", "source"),
    [
        ((5, 2), 1, PLAIN, 0),
        ((2, 3, 5), 1, PLAIN, 2),
        ((4, 0, 4), 1, PLAIN, 2),
        ((3, 3), 1, PLAIN, 1),
        ((5, 2), 2, PLAIN, 0),
        ((1, 4), 1, DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False), 1),
        ((1, 4), 1, DistributedDataParallelKwargs(find_unused_parameters=True), 1),
    ],
    ids=["two", "three", "one without any", "even", "two models", "bucket views", "unused parameters"],
)
def test_gradients_are_the_mean_over_the_ranks_that_are_there(
    counts: tuple[int, ...], num_models: int, options: DistributedDataParallelKwargs, source: int
) -> None:
    expected = reference(counts, num_models)
    for found, sources in run_ranks(train, len(counts), counts, num_models, options):
        assert sources == [source]
        for ours, wanted in zip(found, expected, strict=True):
            assert torch.allclose(ours, wanted, rtol=0, atol=1e-12)


def buffers() -> list[float]:
    rank, strategy = Process.current().topology.rank, DDPStrategy(Process.current())
    (model,) = strategy.prepare(Bundle((nn.BatchNorm1d(1, momentum=1.0),))).models
    with strategy.join([model]):
        for step in range(3 - 2 * rank):
            strategy.backward(model(torch.arange(4.0).unsqueeze(1) + 10 * rank + 100 * step).sum())
    return [float(strategy.unwrap(model).running_mean), float(strategy.unwrap(model).num_batches_tracked)]


def test_buffers_are_those_of_the_last_rank() -> None:
    assert run_ranks(buffers, 2) == [pytest.approx([201.5, 3.0])] * 2


def refused_at_entry(options: DistributedDataParallelKwargs, kind: str) -> str:
    strategy = DDPStrategy(Process.current(), options=options)
    (model,) = strategy.prepare(Bundle((nn.Linear(2, 2).requires_grad_(kind != "frozen"),))).models
    if kind == "synchronised":
        model.add_module("norm", nn.SyncBatchNorm(2))  # afterwards, since torch takes it on accelerators only
    models = [] if kind == "none" else [model]
    with (
        pytest.raises(ConfigError, match=r"Pass what|Leave the hook|Use `BatchNorm`|Leave `static") as caught,
        strategy.join(models),
    ):
        raise AssertionError("entered")
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (PLAIN, "none", "was given no model"),
        (PLAIN, "frozen", "was given Linear, and ranks"),
        (PLAIN, "synchronised", "`SyncBatchNorm`, whose forward waits for all ranks"),
        (DistributedDataParallelKwargs(static_graph=True), "", "`static_graph=True` was set"),
        (DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16), "", "`comm_hook='fp16'` with"),
        (DistributedDataParallelKwargs(comm_wrapper=DDPCommunicationHookType.FP16), "", "`comm_wrapper='fp16'` div"),
    ],
)
def test_what_nobody_can_stand_in_for_is_refused(
    options: DistributedDataParallelKwargs, kind: str, message: str
) -> None:
    for found in run_ranks(refused_at_entry, 2, options, kind):
        assert message in found


def refused_inside(what: str) -> str:
    rank, strategy = Process.current().topology.rank, DDPStrategy(Process.current())
    first, second = strategy.prepare(Bundle((network(0), network(1)))).models

    def one(model: nn.Module) -> None:
        strategy.backward(loss_of(model, 0, rank))

    calls: dict[str, Any] = {
        "sum": lambda: strategy.sum_over_data(torch.ones(())),
        "no_sync": lambda: strategy.no_sync(first),
        "again": lambda: strategy.join([first]).__enter__(),
        "order": lambda: one(second),
        "without gradients": lambda: torch.no_grad()(one)(first),
        "two forwards": lambda: (first(inputs(0, rank)), first(inputs(0, rank))),
        "half a turn": lambda: None,
    }
    leaving = pytest.raises(ConfigError, match="left the block") if what == "half a turn" else None
    if leaving is not None:
        with leaving as caught, strategy.join([first, second]):
            one(first)
        return str(caught.value)
    message = ""
    try:
        with strategy.join([first, second]):
            with pytest.raises(ConfigError, match="block for uneven inputs") as refused:
                calls[what]()
            message = str(refused.value)
            if what == "two forwards":
                raise KeyboardInterrupt  # the first of them cannot be taken back
    except KeyboardInterrupt:
        return message
    with strategy.no_sync(first):  # the block is over
        one(first)
    return message


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sum", "`num_items` of the real rows is exact"),
        ("no_sync", "Use `accumulate`"),
        ("again", "inside another one"),
        ("order", "Model number 1 was called out of turn"),
        ("without gradients", "Evaluate outside the block"),
        ("two forwards", "Model number 0 was called before the backward of the last call"),
        ("half a turn", "after its pass of model number 0, before all 2"),
    ],
)
def test_what_would_wait_for_ever_is_refused(what: str, message: str) -> None:
    for found in run_ranks(refused_inside, 2, what):
        assert message in found


def test_one_process_has_nobody_to_wait_for() -> None:
    with Process.open(ProcessSettings(device="cpu")) as process:
        strategy, model = SingleStrategy(process), network()
        with strategy.join([model], settle=lambda rank: pytest.fail("nobody to settle with")):
            strategy.backward(loss_of(model, 0, 0))
        assert not isinstance(model, DistributedDataParallel)
