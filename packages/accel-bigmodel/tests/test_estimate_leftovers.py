"""What an estimate leaves behind in a model's own code, and what it does not claim to know."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from accel_bigmodel.estimate.allocator import allocator_peak_bytes
from accel_bigmodel.estimate.options import EstimateOptions
from accel_bigmodel.estimate.predict import estimate_memory


@functools.lru_cache
def table(width: int) -> torch.Tensor:
    return torch.arange(float(width))


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(rows) + table(8)
        return out


class Kept(Cached):
    tables: dict[int, torch.Tensor] = {}  # noqa: RUF012 - what such models do

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if 8 not in self.tables:
            self.tables[8] = torch.arange(8.0)
        out: torch.Tensor = self.inner(rows) + self.tables[8]
        return out


def test_caches_of_functions_hold_nothing_of_a_trace() -> None:
    table.cache_clear()
    model = Cached()
    estimate = estimate_memory(model, inputs=torch.ones(4, 8))
    assert not any("without values" in note for note in estimate.notes)
    assert not isinstance(table(8), FakeTensor)
    assert model(torch.ones(4, 8)).sum().item() == model(torch.ones(4, 8)).sum().item()


def test_what_others_keep_is_told() -> None:
    estimate = estimate_memory(Kept(), inputs=torch.ones(4, 8))
    Kept.tables.clear()
    assert any("kept 1 tensors without values" in note for note in estimate.notes)


@pytest.mark.parametrize(("device", "kind"), [("cpu", nn.LSTM), ("cuda", nn.LSTM), ("cuda", nn.GRU)])
def test_training_of_layers_that_hide_memory_is_not_known(device: str, kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(8, 8))
    estimate = estimate_memory(model, EstimateOptions(device=device), inputs=torch.ones(2, 3, 8))  # type: ignore[arg-type]
    assert estimate.training is not None
    assert estimate.training.unknown is not None
    assert f"`0` is an {kind.__name__}" in estimate.training.unknown
    assert estimate.inference.peak is not None


def test_encoders_of_torch_are_traced_layer_by_layer() -> None:
    """In evaluation torch has a kernel for a whole layer, whose memory no trace sees."""
    torch.set_num_threads(1)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 3).eval()
    rows = torch.ones(8, 128, 128)
    predicted = estimate_memory(model, EstimateOptions(device="cpu"), inputs=rows).inference.total_bytes
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            measured = allocator_peak_bytes(lambda: model(rows))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    weights = sum(each.nbytes for each in model.parameters())
    assert predicted is not None
    assert predicted - weights - rows.nbytes == pytest.approx(measured, rel=0.05)
    assert torch.backends.mha.get_fastpath_enabled()
