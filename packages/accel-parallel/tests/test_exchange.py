"""When DDP exchanges gradients, and what is said where it could not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from accel_parallel import Bundle, DDPStrategy, DistributedDataParallelKwargs, SingleStrategy
from accel_state import ConfigError, Process
from accel_state.testing import run_ranks


class NoScaler:
    """As of a precision that scales nothing."""

    enabled = False


class Branches(nn.Module):
    """Two layers, of which a forward uses those it is asked to; one has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2, momentum=1.0)

    def forward(self, inputs: torch.Tensor, use: str = "both") -> torch.Tensor:
        parts = {"first": [self.first], "second": [self.second], "both": [self.first, self.second]}[use]
        normed: torch.Tensor = self.norm(torch.stack([part(inputs) for part in parts]).sum(dim=0))
        return normed.square().sum(dim=1).tanh().mean()


def network() -> Branches:
    torch.manual_seed(0)
    return Branches().double()


def rows(index: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * index + rank), dtype=torch.float64)


def strategy_of(**options: Any) -> SingleStrategy:
    process = Process.current()
    if process.topology.world_size == 1:
        return SingleStrategy(process)
    return DDPStrategy(process, options=DistributedDataParallelKwargs(**options))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exchanged_late(options: dict[str, Any], use: str) -> list[dict[str, torch.Tensor]]:
    """On a rank: gradients after three forwards inside `no_sync`, as their backwards come, then of one more step."""
    strategy, model = strategy_of(**options), network()
    rank = Process.current().topology.rank
    (wrapped,) = strategy.prepare(Bundle((model,))).models
    with strategy.no_sync(wrapped):
        losses = [wrapped(rows(index, rank), use if index == 2 else "both") for index in range(3)]
    found = []
    strategy.backward(losses[0])
    strategy.backward(losses[1])
    found.append(gradients(model))
    with strategy.sync_in_backward(wrapped):
        strategy.backward(losses[2])
    found.append(gradients(model))
    model.zero_grad()
    strategy.backward(wrapped(rows(3, rank)))
    found.append(gradients(model))
    return found


def on_one_process(parts: list[tuple[int, int, str]], world: int) -> dict[str, torch.Tensor]:
    """Gradients of the losses of these micro-batches, each (index, rank, what is used), over `world`."""
    model = network()
    for index, rank, use in parts:
        (model(rows(index, rank), use) / world).backward()
    return gradients(model)


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("world", "options", "use"),
    [
        (1, {}, "both"),
        (2, {}, "both"),
        (3, {}, "both"),
        (2, {"gradient_as_bucket_view": True}, "both"),
        (2, {"find_unused_parameters": True}, "both"),
        (2, {"find_unused_parameters": True}, "first"),
    ],
)
def test_a_backward_that_is_told_so_exchanges_all_that_was_kept(world: int, options: dict[str, Any], use: str) -> None:
    for rank, (local, summed, after) in enumerate(run_ranks(exchanged_late, world, options, use)):
        assert_near(local, on_one_process([(index, rank, "both") for index in (0, 1)], 1))
        parts = [(i, r, use if i == 2 else "both") for i in range(3) for r in range(world)]
        assert_near(summed, on_one_process(parts, world))
        assert_near(after, on_one_process([(3, r, "both") for r in range(world)], world))


def buffers_after_an_exchange() -> tuple[float, float]:
    """On a rank: a running mean after a forward inside `no_sync`, and after the next one that follows an exchange."""
    strategy, model = strategy_of(), network()
    rank = Process.current().topology.rank
    (wrapped,) = strategy.prepare(Bundle((model,))).models
    wrapped(rows(0, rank)).backward()
    with strategy.no_sync(wrapped):
        loss = wrapped(rows(1, rank))
    before = model.norm.running_mean.sum().item()
    with strategy.sync_in_backward(wrapped):
        strategy.backward(loss)
    wrapped.eval()
    wrapped(rows(2, rank))
    return before, model.norm.running_mean.sum().item()


def test_buffers_are_sent_again_after_such_an_exchange() -> None:
    (first, first_after), (second, second_after) = run_ranks(buffers_after_an_exchange, 2)
    assert first != second
    assert first_after == second_after == first


def static() -> str:
    strategy = strategy_of(static_graph=True)
    (wrapped,) = strategy.prepare(Bundle((nn.Linear(1, 1),))).models
    with pytest.raises(ConfigError, match=r"`static_graph=True`.*Leave `static_graph` out") as caught:
        strategy.sync_in_backward(wrapped).__enter__()
    return str(caught.value)


def test_an_exchange_out_of_turn_is_refused_under_a_static_graph() -> None:
    assert len(set(run_ranks(static, 2))) == 1


def frozen() -> bool:
    strategy = strategy_of()
    (model,) = strategy.prepare(Bundle((nn.Linear(1, 1).requires_grad_(False),))).models
    with strategy.sync_in_backward(model):
        return True


def test_a_model_without_gradients_has_nothing_to_exchange() -> None:
    assert run_ranks(frozen, 2) == [True, True]


def step(optimizer: Optimizer, strategy: SingleStrategy) -> None:
    strategy.step(optimizer, scaler=NoScaler())  # type: ignore[arg-type]


def with_unused(use: list[str], options: dict[str, Any], micro_batches: int) -> str:
    """On a rank: what the first step says when this is used by each rank in the last micro-batch of a window."""
    strategy, model = strategy_of(**options), network()
    rank = Process.current().topology.rank
    bundle = strategy.prepare(Bundle((model,), (SGD(model.parameters(), lr=0.1),)))
    (wrapped,), (optimizer,) = bundle.models, bundle.optimizers
    before = [p.detach().clone() for p in model.parameters()]
    for index in range(micro_batches - 1):
        with strategy.no_sync(wrapped):
            strategy.backward(wrapped(rows(index, rank)))
    try:
        strategy.backward(wrapped(rows(9, rank), use[rank]))
    except RuntimeError:
        return "the other rank has gone"
    try:
        step(optimizer, strategy)
    except ConfigError as error:
        assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
        return str(error)
    return "stepped"


@pytest.mark.parametrize(("use", "name"), [("first", "second"), ("second", "first")])
def test_parameters_without_gradient_are_named_before_the_first_step(use: str, name: str) -> None:
    for rank, message in enumerate(run_ranks(with_unused, 2, [use, use], {}, 1)):
        assert f"`{name}.weight`, `{name}.bias` of Branches got no gradient" in message
        assert f"on rank {rank}" in message
        assert "requires_grad_(False)" in message
        assert "find_unused_parameters=True" in message


def test_parameters_that_only_earlier_micro_batches_used_are_noticed_too() -> None:
    for message in run_ranks(with_unused, 2, ["first", "first"], {}, 2):
        assert "Some parameters of Branches got no gradient" in message


def test_a_rank_that_uses_less_than_another_says_so_although_the_other_waits() -> None:
    waited, told = run_ranks(with_unused, 2, ["both", "first"], {}, 1)
    assert waited == "the other rank has gone"
    assert "`second.weight`, `second.bias` of Branches got no gradient" in told
    assert "on rank 1" in told


@pytest.mark.parametrize("use", [["first", "first"], ["both", "first"]])
def test_a_search_for_unused_parameters_lets_them_pass(use: list[str]) -> None:
    assert run_ranks(with_unused, 2, use, {"find_unused_parameters": True}, 1) == ["stepped"] * 2


def watched() -> list[int]:
    """On a rank: how many models are still looked at, as two of them take their first steps."""
    strategy = DDPStrategy(Process.current())
    models = (network(), nn.Linear(3, 1).double())
    optimizers = tuple(SGD(model.parameters(), lr=0.1) for model in models)
    bundle = strategy.prepare(Bundle(models, optimizers))
    counts = [len(strategy._unproven)]
    data = rows(0, strategy.process.topology.rank)
    for model, optimizer in zip(bundle.models, bundle.optimizers, strict=True):
        step(optimizer, strategy)  # without a gradient: nothing is known yet
        counts.append(len(strategy._unproven))
        strategy.backward(model(data).mean())
        step(optimizer, strategy)
        counts.append(len(strategy._unproven))
    gone = strategy.prepare(Bundle((nn.Linear(1, 1),))).models
    counts.append(len(strategy._unproven))
    del gone
    step(optimizers[0], strategy)
    return [*counts, len(strategy._unproven)]


def test_only_first_steps_are_looked_at() -> None:
    assert run_ranks(watched, 2) == [[2, 2, 1, 1, 0, 1, 0]] * 2
