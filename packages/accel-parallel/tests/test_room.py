"""A restored state goes to the memory of the one before, where nothing else lies there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from accel_parallel import Bundle, FullyShardedDataParallelPlugin
from accel_parallel.fsdp.strategy import FSDPStrategy
from accel_parallel.naming import parameter_names
from accel_parallel.room import room_in
from accel_parallel.sharded import local_of, whole
from accel_parallel.single import SingleStrategy
from accel_parallel.strategy import OptimizerState
from accel_state import Process, ProcessSettings
from accel_state.testing import run_ranks

Spoil = Callable[[torch.optim.Optimizer], None]


def trained(strategy: SingleStrategy, make: Any, num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    bundle = strategy.prepare(Bundle((model,), (make(model.parameters()),)))
    for step in range(num_steps):
        torch.manual_seed(step)
        bundle.models[0](torch.randn(3, 6)).square().sum().backward()
        bundle.optimizers[0].step()
    return bundle.models[0], bundle.optimizers[0]


def names_of(strategy: SingleStrategy, model: nn.Module) -> dict[torch.Tensor, str]:
    return parameter_names([("model", strategy.unwrap(model))])


def copied(state: OptimizerState) -> OptimizerState:
    entries = {name: {key: value.clone() for key, value in each.items()} for name, each in state.state.items()}
    return OptimizerState(state=entries, groups=[dict(group) for group in state.groups])


def wholes(state: OptimizerState) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, key): whole(value) for name, each in state.state.items() for key, value in each.items()}


def addresses(optimizer: torch.optim.Optimizer) -> list[int]:
    return [local_of(entry).data_ptr() for entries in optimizer.state.values() for entry in entries.values()]


def restored_in_place() -> None:
    process = Process.current()
    spread = process.topology.world_size > 1
    options = FullyShardedDataParallelPlugin(min_num_params=1)
    strategy = FSDPStrategy(process, options=options) if spread else SingleStrategy(process)
    model, optimizer = trained(strategy, torch.optim.AdamW, 2)
    names = names_of(strategy, model)
    saved = copied(strategy.optimizer_state(optimizer, names))
    in_full = OptimizerState(
        state={
            name: {key: whole(value) for key, value in each.items()}  # as a checkpoint has it, divided by nobody
            for name, each in saved.state.items()
        },
        groups=saved.groups,
    )
    before = addresses(optimizer)
    for state in (in_full, saved):
        model(torch.ones(3, 6)).sum().backward()
        optimizer.step()
        strategy.load_optimizer_state(optimizer, names, state)
        found = wholes(strategy.optimizer_state(optimizer, names))
        assert found.keys() == wholes(saved).keys()
        assert all(torch.equal(found[place], value) for place, value in wholes(saved).items())
        if state is in_full:
            assert addresses(optimizer) == before


def test_of_one_process() -> None:
    with Process.open(ProcessSettings(device="cpu")):
        restored_in_place()


def test_of_shards() -> None:
    run_ranks(restored_in_place, 2)


def partial_entries() -> list[str]:
    strategy = FSDPStrategy(Process.current(), options=FullyShardedDataParallelPlugin(min_num_params=1))
    model, optimizer = trained(strategy, torch.optim.AdamW, 1)
    for parameter, entries in optimizer.state.items():
        entries["norm"] = parameter.detach().norm()  # of which each rank has a summand
    return sorted({key for _, key in room_in(optimizer, names_of(strategy, model))})


def test_a_sum_over_ranks_is_no_room() -> None:
    assert run_ranks(partial_entries, 2) == [["exp_avg", "exp_avg_sq", "step"]] * 2


def two_entries_are_one(optimizer: torch.optim.Optimizer) -> None:
    for entries in optimizer.state.values():
        entries["exp_avg_sq"] = entries["exp_avg"]


def an_entry_is_its_parameter(optimizer: torch.optim.Optimizer) -> None:
    for parameter, entries in optimizer.state.items():
        entries["exp_avg"] = parameter.detach()


def an_entry_is_its_gradient(optimizer: torch.optim.Optimizer) -> None:
    for parameter, entries in optimizer.state.items():
        entries["exp_avg"] = parameter.grad


def an_entry_is_in_a_list_too(optimizer: torch.optim.Optimizer) -> None:
    for entries in optimizer.state.values():
        entries["history"] = [{"of": entries["exp_avg"]}]


def entries_are_parts_of_a_buffer(optimizer: torch.optim.Optimizer) -> None:
    for entries in optimizer.state.values():
        buffer = torch.stack([entries["exp_avg"], entries["exp_avg_sq"]])
        entries["exp_avg"], entries["exp_avg_sq"] = buffer[0], buffer[1]


def an_entry_repeats_one_element(optimizer: torch.optim.Optimizer) -> None:
    for entries in optimizer.state.values():
        entries["exp_avg"] = torch.zeros(1).expand(entries["exp_avg"].shape)


@pytest.mark.parametrize(
    "spoil",
    [
        two_entries_are_one,
        an_entry_is_its_parameter,
        an_entry_is_its_gradient,
        an_entry_is_in_a_list_too,
        entries_are_parts_of_a_buffer,
        an_entry_repeats_one_element,
    ],
)
def test_memory_that_something_else_is_in_stays_as_it_is(spoil: Spoil) -> None:
    with Process.open(ProcessSettings(device="cpu")) as process:
        strategy = SingleStrategy(process)
        model, optimizer = trained(strategy, torch.optim.AdamW, 2)
        names = names_of(strategy, model)
        saved = copied(strategy.optimizer_state(optimizer, names))
        spoil(optimizer)
        assert not any(key == "exp_avg" for _, key in room_in(optimizer, names))
        assert any(key == "step" for _, key in room_in(optimizer, names))
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        kept = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        strategy.load_optimizer_state(optimizer, names, saved)
        found = wholes(strategy.optimizer_state(optimizer, names))
        assert all(torch.equal(found[place], value) for place, value in wholes(saved).items())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))


def test_other_dtypes_and_shapes_get_memory_of_their_own() -> None:
    with Process.open(ProcessSettings(device="cpu")) as process:
        strategy = SingleStrategy(process)
        model, optimizer = trained(strategy, torch.optim.AdamW, 2)
        names = names_of(strategy, model)
        saved = copied(strategy.optimizer_state(optimizer, names))
        for number, entries in enumerate(optimizer.state.values()):
            entries["exp_avg"] = entries["exp_avg"].double() if number % 2 else entries["exp_avg"].new_zeros(1, 1)
        strategy.load_optimizer_state(optimizer, names, saved)
        found = wholes(strategy.optimizer_state(optimizer, names))
        assert all(value.dtype is torch.float32 for value in found.values())
        assert all(torch.equal(found[place], value) for place, value in wholes(saved).items())
