"""A model whose frozen weights are offloaded is prepared, trained, saved and resumed like any other, by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError
from accel_bigmodel.offload.division import group_tensors, travelling
from accel_bigmodel.offload.placeholder import Placeholder
from accel_bigmodel.offload.streaming import stream_tensors
from accel_bigmodel.testing import FakeTransfers
from accel_state.testing import run_ranks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.adapter = nn.Linear(4, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            rows = block(rows)
        out: torch.Tensor = self.adapter(rows) + rows
        return out


def make(*, offloaded: bool, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    model.blocks.requires_grad_(False)
    if offloaded:
        stream_tensors(
            model, travelling(group_tensors(model), offload_buffers=False), {}, transfers=FakeTransfers()
        )  # fmt: skip
        model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    return model


def train(accelerator: Accelerator, model: Any, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(rows) - rows.flip(1)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def prepared(*, offloaded: bool, seed: int = 0) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True)
    model = make(offloaded=offloaded, seed=seed)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    return (accelerator, *accelerator.prepare(model, optimizer))


def test_training_saving_and_resuming(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared(offloaded=False)
    expected = train(accelerator, model, optimizer, 6)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator.end_training()

    accelerator, model, optimizer = prepared(offloaded=True)
    assert sum(isinstance(parameter, Placeholder) for parameter in model.parameters()) == 6
    assert train(accelerator, model, optimizer, 3) == expected[:3]
    accelerator.save_state(tmp_path / "it")
    accelerator.save_model(model, tmp_path / "exported")
    accelerator.end_training()

    # Other values, so that what is loaded shows; offloaded ones too.
    accelerator, model, optimizer = prepared(offloaded=True, seed=1)
    accelerator.load_state(tmp_path / "it")
    assert not any(isinstance(parameter, Placeholder) for parameter in model.adapter.parameters())
    found = model.state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole if name.startswith("blocks"))
    accelerator.end_training()


def refused() -> str:
    with pytest.raises(ConfigError, match="is spread over devices or offloaded") as error:
        Accelerator(cpu=True).prepare(make(offloaded=True))
    return str(error.value)


def test_several_processes_are_refused() -> None:
    for said in run_ranks(refused, 2):
        assert "Launch one process" in said
