"""Weights by dtype and by way to quantize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.estimate.weights import DTYPES, QUANTIZATIONS, Weights, stored_weights, weights_of
from accel_bigmodel.stored import StoredTensor
from accel_state.errors import ConfigError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.inner = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))


def rows(model: nn.Module) -> dict[str, Weights]:
    return {each.name: each for each in weights_of(model)}


@pytest.mark.parametrize("empty", [False, True])
def test_every_dtype_counts_tied_weights_once_and_integers_as_they_are(empty: bool) -> None:
    if empty:
        with init_empty_weights():
            model = Tied()
    else:
        model = Tied()
    elements = 100 * 64 + 2 * (64 * 64 + 64)
    found = rows(model)
    for name, size in zip(DTYPES, (4, 2, 2, 1, 1, 0.5), strict=True):
        assert found[name].total_bytes == elements * size + 8
        assert found[name].largest_bytes == 6400 * size
        assert found[name].largest in ("embed", "head")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bitsandbytes int8", 4096 + 4 * 64),
        ("bitsandbytes nf4", 2048 + 4 * 64 + 64),
        ("bitsandbytes nf4, double", 2048 + 65 + 64 + 1024 + 4),
        ("torchao int8", 4096 + 5 * 64),
        ("torchao int4", 2048 + 4 * 32),
    ],
)
def test_quantizers_take_linear_layers_but_not_the_head(name: str, layer: int) -> None:
    found = rows(Tied())[name]
    assert found.total_bytes == 2 * (6400 + 2 * 64) + 8 + 2 * layer
    assert found.how.startswith("2 linear layers")
    assert set(QUANTIZATIONS) <= set(rows(Tied()))


def test_a_model_without_linear_layers_has_no_row_for_quantizers() -> None:
    assert not set(QUANTIZATIONS) & set(rows(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))))


def test_headers_give_the_same_without_a_model() -> None:
    shapes = {"a": (torch.bfloat16, (10, 8)), "b": (torch.int64, (3,))}
    stored = {name: StoredTensor(Path("x"), name, dtype, shape, 0) for name, (dtype, shape) in shapes.items()}
    found = {each.name: each for each in stored_weights(stored)}
    assert found["as stored"].total_bytes == 184
    assert found["as stored"].how == "the checkpoint's own bytes (bfloat16, int64)"
    assert found["float32"].total_bytes == 320 + 24
    assert found["int4"].total_bytes == 40 + 24
    assert found["float32"].largest == "a"


def test_an_unknown_dtype_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'bfloat61' is no dtype.*Did you mean 'bfloat16'"):
        weights_of(nn.Linear(2, 2), dtypes=("bfloat61",))
    assert weights_of(nn.Linear(2, 2), dtypes=("fp8", "bf16"))[0].name == "float8_e4m3fn"
