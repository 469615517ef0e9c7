"""Stored tensors that are renamed, or put side by side in one of the model's, as a model may describe it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel.loading import ReadSettings, fused, load_checkpoint_in_model
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError


class Renaming:
    """Stands for what transformers describes: a pattern, and what to write for it."""

    def __init__(self, source: str, target: str) -> None:
        self.source_patterns = [source]
        self.target = target

    def rename_source_key(self, name: str) -> tuple[str, str | None]:
        for each in self.source_patterns:
            pattern = re.escape(each).replace(r"\*", r"\d+")
            if re.search(pattern, name):
                return re.sub(pattern, self.target, name), each
        return name, None


class Fusing(Renaming):
    def __init__(self, sources: list[str], target: str, *operations: Any) -> None:
        self.source_patterns = sources
        self.target = target
        self.operations = operations


class MergeModulelist(SimpleNamespace): ...


class Concatenate(SimpleNamespace): ...


class Transpose(SimpleNamespace): ...


NUM, FEW, MANY = 12, 3, 50
STORED = {
    f"old.experts.{number}.{key}.weight": torch.randn(*shape)
    for number in range(NUM)
    for key, shape in (("w1", (FEW, MANY)), ("w3", (FEW + 1, MANY)), ("w2", (MANY, FEW)))
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(NUM, 2 * FEW + 1, MANY))
        self.down = nn.Parameter(torch.zeros(NUM, MANY, FEW))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = Experts()


def described() -> list[Any]:
    both = (MergeModulelist(dim=0), Concatenate(dim=1))
    return [
        Renaming("old.", "new."),
        Fusing(["experts.*.w1.weight", "experts.*.w3.weight"], "gate_up", *both),
        Fusing(["experts.*.w2.weight"], "down", MergeModulelist(dim=0)),
    ]


def load(folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], **arguments: Any) -> Any:
    save_file(tensors, folder / "x.safetensors")
    return load_checkpoint_in_model(model, folder, reading=ReadSettings(chunk_bytes=4096), **arguments)


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_experts_are_read_into_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None) -> None:
    monkeypatch.setattr(fused, "_transforms", lambda _: described())
    model: Any = Model()
    load(tmp_path, model, STORED, dtype=dtype)
    for number in range(NUM):
        parts = [STORED[f"old.experts.{number}.{key}.weight"] for key in ("w1", "w3", "w2")]
        assert torch.equal(model.new.gate_up[number], torch.cat(parts[:2]).to(model.new.gate_up.dtype))
        assert torch.equal(model.new.down[number], parts[2].to(model.new.down.dtype))


def test_a_missing_expert_is_not_filled_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_transforms", lambda _: described())
    tensors = {name: each for name, each in STORED.items() if ".5.w2." not in name}
    with pytest.raises(CheckpointError, match=r"`new\.down` is \[12, 50, 3\] in the model and \[50, 3\] each, 11"):
        load(tmp_path, Model(), tensors)


@pytest.mark.parametrize("dim", [0, 1])
def test_two_tensors_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    transform = Fusing([".q", ".k", ".v"], ".qkv", Concatenate(dim=dim))
    monkeypatch.setattr(fused, "_transforms", lambda _: [transform])
    shapes = [(4, 6), (4, 6), (4, 6)] if dim else [(2, 6), (3, 6), (5, 6)]
    tensors = {f"a.{key}": torch.randn(*shape) for key, shape in zip("qkv", shapes, strict=True)}
    expected = torch.cat(list(tensors.values()), dim=dim)
    model: Any = nn.Module()
    model.a = nn.Module()
    model.a.qkv = nn.Parameter(torch.zeros(expected.shape))
    load(tmp_path, model, tensors)
    assert torch.equal(model.a.qkv, expected)


def test_a_checkpoint_in_the_models_own_form_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_transforms", lambda _: [Renaming("new.", "newer."), *described()])
    model: Any = Model()
    tensors = {name: torch.randn(each.shape) for name, each in model.named_parameters()}
    load(tmp_path, model, tensors)
    assert torch.equal(model.new.down, tensors["new.down"])


def test_more_than_putting_side_by_side_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = Fusing(["experts.*.w2.weight"], "down", MergeModulelist(dim=0), Transpose(dim0=1, dim1=2))
    monkeypatch.setattr(fused, "_transforms", lambda _: [Renaming("old.", "new."), transform])
    with pytest.raises(CheckpointError, match=r"`new\.down` is stored in another form .*MergeModulelist and Transpose"):
        load(tmp_path, Model(), STORED)


def test_models_of_others_describe_nothing() -> None:
    assert fused._transforms(nn.Linear(1, 1)) == []
