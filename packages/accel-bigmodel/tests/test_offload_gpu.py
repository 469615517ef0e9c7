"""Offloading to a real accelerator: streams, events and pinned memory that the stand-in only stands for."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel.dispatch import dispatch_model
from accel_bigmodel.offload.handover import cpu_offload_with_hook
from accel_bigmodel.offload.hooks import units_of
from accel_bigmodel.offload.offloading import cpu_offload, disk_offload, remove_hooks
from accel_bigmodel.stored import read_index
from accel_bigmodel.testing import save_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: its streams and pinned memory"),
]

WIDTH, DEPTH = 1024, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = rows + self.down(torch.tanh(self.up(rows)))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            rows = block(rows)
        out: torch.Tensor = self.head(rows)
        return out


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def rows() -> torch.Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()


def resident() -> torch.Tensor:
    with torch.no_grad():
        return make().cuda()(rows()).cpu()  # type: ignore[no-any-return]


def offloaded(kind: str, folder: Path) -> Any:
    if kind == "host":
        return cpu_offload(make(), 0)
    if kind == "pageable":
        return cpu_offload(make(), 0, pinned_memory=0)
    if kind == "file":
        save_file(make().state_dict(), folder / "model.safetensors")
        return disk_offload(make().to("meta"), folder, 0, offload_index=read_index(folder))
    half = {f"blocks.{number}": "cpu" if number % 2 else 0 for number in range(DEPTH)}
    return dispatch_model(make(), {**half, "head": 0})


@pytest.mark.parametrize("kind", ["host", "pageable", "file", "half"])
def test_every_pass_gives_what_the_resident_model_gives(tmp_path: Path, kind: str) -> None:
    """Many passes without waiting between them, so that copies and kernels really overlap."""
    expected = resident()
    model = offloaded(kind, tmp_path)
    given = rows()
    with torch.no_grad():
        found = [model(given) for _ in range(30)]
    assert all(torch.equal(each.cpu(), expected) for each in found)
    for unit in units_of(model):
        unit.engine.close()


def test_no_more_than_the_slots_is_on_the_device() -> None:
    model = cpu_offload(make(), 0)
    given = rows()
    with torch.no_grad():
        model(given)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - units_of(model)[0].engine.budget_bytes
        for _ in range(5):
            model(given)
        torch.cuda.synchronize()
    activations = 64 * 5 * WIDTH * 4 * 4
    budget = units_of(model)[0].engine.budget_bytes
    assert torch.cuda.max_memory_allocated() - before <= 2 * budget + activations


def test_copies_are_behind_the_hosts_back() -> None:
    """The host gives all of a pass to the device before the device is done with it."""
    model = cpu_offload(make(), 0)
    given = rows()
    with torch.no_grad():
        for _ in range(3):
            model(given)
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)
        model(given)
        assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_adapters_are_trained() -> None:
    def train(offload: bool) -> list[float]:
        model = make().requires_grad_(False)
        for block in model.blocks:
            block.register_module("adapter", nn.Linear(WIDTH, WIDTH))
            block.register_forward_hook(lambda module, _, out: out + 0.1 * module.adapter(out))
        model = cpu_offload(model, 0) if offload else model.cuda()
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.01)
        losses = []
        for _ in range(5):
            loss = model(rows()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert train(offload=True) == train(offload=False)


def test_copies_deletion_and_removal() -> None:
    expected = resident()
    model = cpu_offload(make(), 0)
    twin = copy.deepcopy(model)
    given = rows()
    with torch.no_grad():
        assert torch.equal(twin(given).cpu(), expected)
        assert torch.equal(model(given).cpu(), expected)
    del model
    with torch.no_grad():
        assert torch.equal(twin(given).cpu(), expected)
    remove_hooks(twin)
    assert next(twin.parameters()).device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(twin.cuda()(given).cpu(), expected)


def test_models_take_turns() -> None:
    expected = resident()
    first, hook = cpu_offload_with_hook(make(), 0)
    second, after = cpu_offload_with_hook(make(), 0, hook)
    given = rows()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(first(given).cpu(), expected)
            assert torch.equal(second(given).cpu(), expected)
            after.offload()
