"""Names, shapes and dtypes of both sides brought together, and what is said where they do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading import load_checkpoint_in_model
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError, ConfigError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **changed: torch.Tensor | None) -> Path:
    every = {**tensors, **changed}
    kept = {name: each.contiguous().clone() for name, each in every.items() if each is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "embed.weight": torch.randn(6, 4), "inner.weight": torch.randn(4, 4), "inner.bias": torch.randn(4),
        "scale": torch.randn(2),
    }  # fmt: skip


def empty(model: type[nn.Module] = Tied) -> Any:
    with init_empty_weights():
        return model()


def test_a_tied_parameter_needs_one_of_its_names_only_and_stays_tied(tmp_path: Path) -> None:
    for number, name in enumerate(["embed.weight", "head.weight"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = state()
        tensors[name] = tensors.pop("embed.weight")
        model = empty()
        result = load_checkpoint_in_model(model, write(folder, tensors))
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, tensors[name])
        assert (result.missing, result.unexpected) == ((), ())
        assert set(result.places) == {"embed.weight", "head.weight", "inner.weight", "inner.bias", "scale"}


def test_a_tied_parameter_stored_twice_alike_is_fine(tmp_path: Path) -> None:
    model = empty()
    load_checkpoint_in_model(model, write(tmp_path, {**state(), "head.weight": state()["embed.weight"]}))
    assert torch.equal(model.head.weight, state()["embed.weight"])


def test_a_tied_parameter_stored_with_two_values_loses_none_unseen(tmp_path: Path) -> None:
    folder = write(tmp_path, {**state(), "head.weight": torch.zeros(6, 4)})
    with pytest.raises(CheckpointError, match=r"`embed\.weight` and `head\.weight` are one tensor in the model"):
        load_checkpoint_in_model(empty(), folder)
    model = empty()
    load_checkpoint_in_model(model, folder, strict=False)
    assert torch.equal(model.head.weight, state()["embed.weight"])


def test_missing_and_unexpected_names_are_listed_with_the_nearest(tmp_path: Path) -> None:
    tensors = state()
    tensors["inner.wieght"] = tensors.pop("inner.weight")
    folder = write(tmp_path, tensors, other=torch.ones(1))
    expected = (
        r"does not fit the Tied: 1 of the model's tensors are not in it: `inner\.weight` \(the other side has "
        r"'inner\.wieght'\); 2 of its 5 tensors are not in the model: `inner\.wieght` \(.*`strict=False`"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint_in_model(empty(), folder)


def test_without_strict_the_result_and_the_log_say_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = state()
    del tensors["inner.weight"]
    model = empty()
    result = load_checkpoint_in_model(model, write(tmp_path, tensors, other=torch.ones(1)), strict=False)
    assert result.missing == ("inner.weight",)
    assert result.unexpected == ("other",)
    assert "1 missing (inner.weight) and 1 unexpected (other)" in caplog.text
    assert model.inner.weight.is_meta
    assert torch.equal(model.inner.bias, tensors["inner.bias"])


def test_nothing_is_changed_by_a_load_that_is_refused(tmp_path: Path) -> None:
    model = Tied()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint_in_model(model, write(tmp_path, state(), scale=None))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_only_five_names_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"16 of the model's tensors are not in it: `0\.weight`.* and 11 more;"):
        load_checkpoint_in_model(nn.Sequential(*(nn.Linear(1, 1) for _ in range(8))), tmp_path)


@pytest.mark.parametrize("device_map", [{"": "cpu", "embed": "disk"}, {"": "disk", "head": "cpu"}])
def test_a_tied_parameter_with_two_places_is_where_it_can_be_used_at_once(
    tmp_path: Path, device_map: dict[str, str]
) -> None:
    model = empty()
    result = load_checkpoint_in_model(model, write(tmp_path, state()), device_map)
    assert result.places["embed.weight"] == result.places["head.weight"] == torch.device("cpu")
    assert model.head.weight is model.embed.weight


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Tied()


def test_a_prefix_in_the_file_is_diagnosed_and_the_advice_works(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"model.{name}": each for name, each in state().items()})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_in_model(empty(), folder)
    assert "Names of the checkpoint begin with 'model.' and those of the model do not" in str(caught.value)
    advice = re.search(r"into `torch\.(nn\.ModuleDict\(.*?\))`", str(caught.value))
    assert advice is not None
    model = empty()
    load_checkpoint_in_model(eval(advice[1], {"nn": nn, "model": model}), folder)
    assert torch.equal(model.inner.weight, state()["inner.weight"])


def test_a_prefix_in_the_model_is_diagnosed_and_the_advice_works(tmp_path: Path) -> None:
    folder = write(tmp_path, state())
    with pytest.raises(CheckpointError, match=r"into that part: `load_checkpoint_in_model\(model\.model, \.\.\."):
        load_checkpoint_in_model(empty(Outer), folder)
    model = empty(Outer)
    load_checkpoint_in_model(model.model, folder)
    assert torch.equal(model.model.inner.weight, state()["inner.weight"])


def test_other_shapes_are_named_both_even_without_strict(tmp_path: Path) -> None:
    folder = write(tmp_path, state(), **{"inner.weight": torch.ones(4, 5)})
    with pytest.raises(CheckpointError, match=r"`inner\.weight` is \[4, 4\] in the model and \[4, 5\] in the file"):
        load_checkpoint_in_model(empty(), folder, strict=False)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(torch.float32, torch.int8), (torch.int64, torch.float32), (torch.int8, torch.int64)]
)
def test_dtypes_of_another_kind_are_refused(tmp_path: Path, ours: torch.dtype, theirs: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("x", torch.zeros(3, dtype=ours))
    save_file({"x": torch.ones(3, dtype=theirs)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"`x` is {ours} in the model and {theirs} in .*load_and_quantize_model"):
        load_checkpoint_in_model(model, tmp_path)


def test_a_buffer_that_is_not_saved_is_neither_asked_for_nor_overwritten(tmp_path: Path) -> None:
    model = empty()
    load_checkpoint_in_model(model, write(tmp_path, state()))
    assert model.table.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(CheckpointError, match="1 of these, `table` the first, are buffers that the model does not"):
        load_checkpoint_in_model(empty(), write(tmp_path, state(), table=torch.zeros(3)))


def test_a_buffer_without_values_that_is_not_saved_is_asked_for(tmp_path: Path) -> None:
    with init_empty_weights(include_buffers=True):
        model: Any = Tied()
    with pytest.raises(CheckpointError, match=r"`table`.*make it by `init_empty_weights\(include_buffers=False\)`"):
        load_checkpoint_in_model(model, write(tmp_path, state()))
    load_checkpoint_in_model(model, write(tmp_path, state(), table=torch.ones(3)))
    assert model.table.tolist() == [1.0, 1.0, 1.0]


def test_what_a_model_declares_as_ignorable_is_not_asked_for(tmp_path: Path) -> None:
    model = empty()
    model._keys_to_ignore_on_load_missing = [r"inner\.bias"]
    model._keys_to_ignore_on_load_unexpected = {"^old"}
    result = load_checkpoint_in_model(model, write(tmp_path, state(), **{"inner.bias": None, "old.x": torch.ones(1)}))
    assert result.missing == ("inner.bias",)
    assert result.unexpected == ("old.x",)


def test_a_parameter_without_a_shape_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"`weight` has no shape yet \(UninitializedParameter\).*Call the model once"):
        load_checkpoint_in_model(nn.LazyLinear(2), tmp_path)
