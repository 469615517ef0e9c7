"""``parallelism="auto"``: a plan is chosen when the model is prepared, printed, followed, and trains as one process."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accel import Accelerator, AutoParallelism, ConfigError, FullyShardedDataParallelPlugin, Process
from accel_parallel.auto import detect_hardware
from accel_state.testing import rank_environment, run_ranks

_WIDTH, _ROWS = 32, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.down(torch.tanh(self.up(hidden)))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(_WIDTH, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            rows = block(rows)
        out: torch.Tensor = self.head(rows)
        return out


def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(_ROWS, _WIDTH, generator=generator, dtype=torch.float64),
        torch.randint(2, (_ROWS,), generator=generator),
    )


def _net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def _train(memory_bytes: int | None, batch_size: int) -> tuple[str, bool, list[float]]:
    process = Process.open(environment=rank_environment())
    request: Any = "auto"
    if memory_bytes is not None:
        hardware = replace(detect_hardware(process.topology, "cpu"), memory_bytes=memory_bytes)
        request = AutoParallelism(hardware=hardware)
    accelerator = Accelerator(cpu=True, parallelism=request)
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader: Any = DataLoader(_data(), batch_size=batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    plan = accelerator.plan
    assert plan is not None
    assert plan.strategy == accelerator.strategy.name
    losses = []
    for rows, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(rows), labels)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach()).item())
    accelerator.end_training()
    return plan.strategy, plan.activation_checkpointing, losses


def _alone() -> list[float]:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for rows, labels in DataLoader(_data(), batch_size=8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(rows), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("memory_bytes", [None, 1_200_000])
def test_whatever_is_chosen_trains_as_one_process(memory_bytes: int | None) -> None:
    for strategy, _, losses in run_ranks(_train, 2, memory_bytes, 4, open_process=False):
        assert losses == pytest.approx(_alone(), abs=1e-10)
        if memory_bytes is not None:
            assert strategy == "fsdp"


def _refused(case: str) -> str:
    Process.open(environment=rank_environment())
    try:
        _provoke(case)
    except ConfigError as error:
        return str(error)
    finally:
        if Process.is_open():
            Process.current().close()
    return "nothing"


class _Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter([torch.zeros(_WIDTH)])


def _provoke(case: str) -> None:
    if case == "word":
        Accelerator(cpu=True, parallelism="fastest")  # type: ignore[arg-type]
    if case == "twice":
        Accelerator(cpu=True, parallelism="auto", fsdp_plugin=FullyShardedDataParallelPlugin())
    if case == "lengths":
        AutoParallelism(sequence_length=3, example_inputs=torch.zeros(1))
    if case == "half a sample":
        AutoParallelism(batch_size=2.5)  # type: ignore[arg-type]
    if case == "no tokens":
        AutoParallelism(sequence_length=0)
    if case == "no memory":
        AutoParallelism(reserve=1.0)
    accelerator = Accelerator(cpu=True, parallelism="auto")
    if case == "nothing to look at":
        accelerator.prepare(_net(), DataLoader(TensorDataset(torch.zeros(0, _WIDTH)), batch_size=2))
    if case == "no loader":
        accelerator.prepare(_net())
    if case == "stream":
        accelerator.prepare(_net(), DataLoader(_Stream(), batch_size=2))
    if case == "two models":
        accelerator.prepare(_net(), _net())
    if case == "too large":
        hardware = replace(detect_hardware(accelerator.process.topology, "cpu"), memory_bytes=10_000)
        small = Accelerator(cpu=True, parallelism=AutoParallelism(hardware=hardware))
        small.prepare(_net(), DataLoader(_data(), batch_size=4))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("word", r"`parallelism='fastest'` is not known\. Use 'auto'"),
        ("twice", r"chooses how the run is spread, and `fsdp_plugin` says it already"),
        ("lengths", "Give one of them"),
        ("half a sample", r"`batch_size=2\.5` is no number of samples\. Give a positive integer"),
        ("no tokens", "`sequence_length=0` is no number of tokens"),
        ("no memory", r"`reserve=1\.0` is no part of a device's memory"),
        ("nothing to look at", r"the dataset of the loader is empty\. Give it samples"),
        ("no loader", r"how many samples a process computes at once.*AutoParallelism\(batch_size=\.\.\.\)"),
        ("stream", r"read by index.*example_inputs"),
        ("two models", "plans for one model, and 2 are prepared"),
        ("too large", "No plan fits `Net`"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(case: str, message: str) -> None:
    (found,) = run_ranks(_refused, 1, case, open_process=False)
    assert re.search(message, found), found


def _plan_twice() -> str:
    process = Process.open(environment=rank_environment())
    hardware = replace(detect_hardware(process.topology, "cpu"), memory_bytes=1_200_000)
    for request in (AutoParallelism(hardware=hardware), AutoParallelism()):
        accelerator = Accelerator(cpu=True, parallelism=request)
        try:
            accelerator.prepare(_net(), DataLoader(_data(), batch_size=4))
        except ConfigError as error:
            return str(error)
        finally:
            accelerator.free_memory()
    return "nothing"


def test_a_second_run_that_would_divide_the_world_otherwise_says_what_to_close() -> None:
    for found in run_ranks(_plan_twice, 2, open_process=False):
        assert re.search(r"divided into dp_shard=2 already.*`close\(\)` the process first", found), found
