"""Local steps in a script without an `Accelerator`, and what an average does to each kind of tensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from accel_parallel import Bundle, DDPStrategy, Duty, SingleStrategy
from accel_parallel.local_sgd import LocalSGD, average_model
from accel_state import ConfigError, Process, ProcessSettings
from accel_state.testing import run_ranks


@pytest.fixture
def process() -> Iterator[Process]:
    with Process.open(ProcessSettings(device="cpu")) as opened:
        yield opened


def quadratic(steps: int, every: int) -> list[float]:
    """On a rank: one weight after each local step towards this rank's own target."""
    rank = Process.current().topology.rank
    strategy = DDPStrategy(Process.current())
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    bundle = strategy.prepare(Bundle((net,), (SGD(net.parameters(), lr=0.25),)))
    (model,), (optimizer,) = bundle.models, bundle.optimizers
    found = []
    with LocalSGD(model=model, strategy=strategy, local_sgd_steps=every) as local_sgd:
        for _ in range(steps):
            optimizer.zero_grad()
            strategy.backward((model(torch.ones(1, 1).double()) - rank).square().sum())
            optimizer.step()
            local_sgd.step()
            found.append(net.weight.item())
    return [*found, net.weight.item()]


def test_weights_part_and_meet() -> None:
    # A step halves the distance to the rank's number; ranks meet after the second step and at the end.
    first, second, third = run_ranks(quadratic, 3, 3, 2)
    assert first == pytest.approx([0.0, 0.75, 0.375, 0.875], abs=1e-12)
    assert second == pytest.approx([0.5, 0.75, 0.875, 0.875], abs=1e-12)
    assert third == pytest.approx([1.0, 0.75, 1.375, 0.875], abs=1e-12)


class Mixed(nn.Module):
    """One tensor of each kind that an average treats in its own way."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        constant = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        self.small = nn.Parameter(torch.full((3,), 1.0 + min(rank, 1) / 128, dtype=torch.bfloat16))
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t() * (rank + 1))
        self.frozen = nn.Parameter(constant + rank, requires_grad=False)
        self.register_buffer("constant", constant)
        self.register_buffer("running", torch.tensor(float(rank)))
        self.register_buffer("seen", torch.tensor(10 * rank))
        self.tied = self.small


def averaged() -> dict[str, torch.Tensor]:
    model = Mixed(Process.current().topology.rank)
    average_model(model)
    return dict(model.state_dict())


def test_each_kind_of_tensor_is_averaged_as_it_should() -> None:
    constant = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for rank, state in enumerate(run_ranks(averaged, 3)):
        # In bfloat16 the sum of 1 and twice 1 + 1/128 would be rounded to 3; in float32 it is not.
        assert state["small"].tolist() == [1 + 1 / 128] * 3
        assert torch.equal(state["turned"], torch.arange(6.0).reshape(2, 3).t() * 2)
        assert torch.equal(state["constant"], constant)
        assert torch.equal(state["frozen"], constant + rank)
        assert (state["running"].item(), state["seen"].item()) == (1.0, 10 * rank)


def averaged_in_portions() -> list[float]:
    from accel_parallel import local_sgd

    local_sgd._AT_ONCE_BYTES = 40  # type: ignore[misc] # of this rank's process, which ends after this
    model = nn.ParameterList([torch.full((size,), float(Process.current().topology.rank)) for size in (3, 30, 2, 8, 9)])
    average_model(model)
    return [value for each in model for value in set(each.tolist())]


def test_many_tensors_go_in_portions() -> None:
    assert run_ranks(averaged_in_portions, 2) == [[0.5] * 5] * 2


def test_a_world_of_one_does_nothing(process: Process) -> None:
    model = nn.Linear(1, 1)
    with LocalSGD(model=model, strategy=SingleStrategy(process), local_sgd_steps=1) as local_sgd:
        local_sgd.step()
    assert (local_sgd.enabled, local_sgd.steps_taken) == (False, 1)


@pytest.mark.parametrize("steps", [0, -1, True, 2.0])
def test_a_number_of_steps_that_is_none(steps: int, process: Process) -> None:
    with pytest.raises(ConfigError, match=rf"`local_sgd_steps={steps}` is not a number of steps"):
        LocalSGD(model=nn.Linear(1, 1), strategy=SingleStrategy(process), local_sgd_steps=steps)


def in_its_own_step() -> str:
    class Stepping(DDPStrategy):
        name = "stepping"
        owns = frozenset({Duty.STEP})

    strategy = Stepping(Process.current())
    (model,) = strategy.prepare(Bundle((nn.Linear(1, 1),))).models
    assert isinstance(model, DistributedDataParallel)
    with pytest.raises(ConfigError, match="exchanges gradients in a step of its own") as caught:
        LocalSGD(model=model, strategy=strategy, local_sgd_steps=2)
    return str(caught.value)


def test_a_backend_that_steps_by_itself_is_refused() -> None:
    assert all("`stepping`" in message for message in run_ranks(in_its_own_step, 2))
