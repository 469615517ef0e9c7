"""Sizes in bytes: of every module, by dtype, with ties; and the largest layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accel_bigmodel import (
    calculate_maximum_sizes,
    compute_module_sizes,
    format_bytes,
    init_empty_weights,
    named_module_tensors,
    print_sizes,
    size_table,
    total_size_bytes,
)
from accel_state.errors import ConfigError


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture(params=["real", "meta"])
def model(request: pytest.FixtureRequest) -> Language:
    if request.param == "real":
        return Language()
    with init_empty_weights(include_buffers=True):
        return Language()


def test_sizes_of_modules_and_tensors_with_ties_counted_once(model: Language) -> None:
    assert compute_module_sizes(model) == {
        "": 160 + 32 + 32 + 8,
        "embed": 160,
        "embed.weight": 160,
        "norm": 72,
        "norm.weight": 16,
        "norm.bias": 16,
        "norm.running_mean": 16,
        "norm.running_var": 16,
        "norm.num_batches_tracked": 8,
        "head": 160,
        "head.weight": 160,
    }
    assert total_size_bytes(model) == 232


def test_a_dtype_converts_floating_point_only(model: Language) -> None:
    sizes = compute_module_sizes(model, dtype=torch.bfloat16)
    assert sizes["norm"] == 32 + 8
    assert sizes[""] == 120
    assert total_size_bytes(model, dtype="float64") == 160 * 2 + 64 * 2 + 8
    special = compute_module_sizes(
        model, dtype="fp16", special_dtypes={"norm.weight": torch.float32, "norm.num_batches_tracked": "int32"}
    )
    assert (special["norm.weight"], special["norm.bias"], special["norm.num_batches_tracked"]) == (16, 8, 4)


def test_dtypes_below_a_byte_are_packed() -> None:
    assert total_size_bytes(nn.Linear(3, 1, bias=False), dtype=torch.float16) == 6
    sizes = compute_module_sizes(nn.Linear(3, 1, bias=False), special_dtypes={"weight": torch.int4})
    assert sizes == {"": 2, "weight": 2}


def test_buffers_only(model: Language) -> None:
    sizes = compute_module_sizes(model, buffers_only=True)
    assert sizes[""] == sizes["norm"] == 40
    assert sizes["embed"] == 0
    assert "norm.weight" not in sizes


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Transformer(16, 2, 2, 2, dim_feedforward=32, batch_first=True),
        lambda: nn.LSTM(4, 4, 2, bidirectional=True),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.ReLU,
    ],
)
def test_the_whole_is_what_the_tensors_take(make: type[nn.Module]) -> None:
    model = make()
    expected = sum(each.numel() * each.element_size() for each in [*model.parameters(), *model.buffers()])
    sizes = compute_module_sizes(model)
    assert sizes[""] == expected
    for name, module in model.named_modules():
        inner = [*module.parameters(), *module.buffers()]
        assert sizes[name] == sum(each.numel() * each.element_size() for each in inner)


def test_an_unknown_special_dtype_is_refused(model: Language) -> None:
    with pytest.raises(ConfigError, match=r"gives a dtype for 'norm\.weigth'.*Did you mean 'norm\.weight'.*full name"):
        compute_module_sizes(model, special_dtypes={"norm.weigth": torch.int8})


def test_named_tensors_of_one_module() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert [name for name, _ in named_module_tensors(model)] == ["scratch"]
    names = [name for name, _ in named_module_tensors(model, recurse=True, remove_non_persistent=True)]
    assert names == [*dict(model.named_parameters()), "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert len(list(named_module_tensors(model, recurse=True))) == len(names) + 1
    assert [name for name, _ in named_module_tensors(model[0], include_buffers=False)] == ["weight", "bias"]
    model[1].register_buffer("cache", torch.zeros(1), persistent=False)
    assert "1.cache" not in dict(named_module_tensors(model, recurse=True, remove_non_persistent=True))


def test_the_largest_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)))
    total, (largest_bytes, names) = calculate_maximum_sizes(model)
    assert total == (6 + 12 + 10) * 4
    assert (largest_bytes, names) == (48, ["1.0"])
    assert calculate_maximum_sizes(model, no_split_classes=["Sequential"])[1] == (88, ["1"])
    model._no_split_modules = ["Sequential"]  # type: ignore[assignment]
    assert calculate_maximum_sizes(model)[1] == (88, ["1"])
    assert calculate_maximum_sizes(model, no_split_classes=[])[1] == (48, ["1.0"])


def test_the_largest_layer_may_be_a_tensor_of_the_model_itself_or_several() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert calculate_maximum_sizes(model) == (16, (8, ["0", "1"]))
    model.register_parameter("table", nn.Parameter(torch.zeros(5)))
    assert calculate_maximum_sizes(model) == (36, (20, ["table"]))
    assert calculate_maximum_sizes(nn.Linear(2, 1)) == (12, (8, ["weight"]))
    assert calculate_maximum_sizes(nn.ReLU()) == (0, (0, []))


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1.5 * 2**30, "1.50 GiB"),
        (2**40, "1.00 TiB"),
        (-(2**20), "-1.00 MiB"),
        (3 * 2**60, "3072.00 PiB"),
    ],
)
def test_bytes_as_text(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text


@given(st.integers(0, 2**50))
def test_bytes_as_text_are_close(size_bytes: int) -> None:
    number, unit = format_bytes(size_bytes).split()
    power = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert float(number) * 1024**power == pytest.approx(size_bytes, abs=0.006 * 1024**power)


def test_the_table(model: Language, capsys: pytest.CaptureFixture[str]) -> None:
    lines = size_table(model).splitlines()
    assert [line.split() for line in lines] == [
        ["module", "class", "elements", "size", "share"],
        ["(model)", "Language", "57", "232", "B", "100.0%"],
        ["embed", "Embedding", "40", "160", "B", "69.0%"],
        ["norm", "BatchNorm1d", "17", "72", "B", "31.0%"],
        ["head", "Linear", "40", "160", "B", "69.0%"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert len(size_table(model, depth=0).splitlines()) == 2
    assert size_table(nn.ReLU()).splitlines()[1].split()[-1] == "-"
    print_sizes(model, dtype="float16")
    assert "120 B" in capsys.readouterr().out
