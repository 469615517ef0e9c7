"""Autocast on the same module object: what forward computes in, what it returns, and that copies run themselves."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from accel_precision import AutocastKwargs, FullPrecision, MixedPrecision, precision
from accel_state.dtypes import DTypePolicy
from accel_state.errors import ConfigError
from accel_state.protocols import Precision
from accel_state.tree import tensor_leaves

CPU = torch.device("cpu")
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.seen: list[torch.dtype] = []

    def forward(self, inputs: torch.Tensor, *, extra: int = 1) -> dict[str, Any]:
        """Adds."""
        hidden = self.linear(inputs)
        self.seen.append(hidden.dtype)
        other = hidden.to(torch.float16 if hidden.dtype is torch.bfloat16 else torch.bfloat16)
        return {
            "hidden": hidden * extra,
            "other": other,
            "double": hidden.double(),
            "index": torch.tensor([1]),
            "n": extra,
        }


@pytest.mark.parametrize("name", NAMES)
def test_forward_computes_in_the_dtype_and_returns_float32(name: str) -> None:
    model = Model()
    wrapped = precision(name, device=CPU).wrap_forward(model)
    assert wrapped is model
    outputs = model(torch.ones(4, 3), extra=2)
    assert model.seen == [NAMES[name]]
    assert outputs["hidden"].dtype is torch.float32
    assert outputs["double"].dtype is torch.float64
    assert outputs["other"].dtype in set(NAMES.values()) - {NAMES[name]}
    assert outputs["index"].dtype is torch.int64
    assert outputs["n"] == 2
    outputs["hidden"].sum().backward()
    assert model.linear.weight.grad is not None
    assert model.linear.weight.grad.dtype is torch.float32


def test_state_dict_class_signature_and_docstring_stay() -> None:
    model = Model()
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    precision("bf16", device=CPU).wrap_forward(model)
    assert list(model.state_dict()) == keys
    assert type(model) is Model
    assert inspect.signature(model.forward) == signature
    assert list(signature.parameters) == ["inputs", "extra"]
    assert model.forward.__doc__ == "Adds."


def test_wrapping_twice_changes_nothing_and_unwrapping_restores() -> None:
    model, bf16 = Model(), precision("bf16", device=CPU)
    bf16.wrap_forward(model)
    forward = model.forward
    bf16.wrap_forward(model)
    assert model.__dict__["forward"] is forward
    assert bf16.unwrap_forward(model) is model
    assert "forward" not in model.__dict__
    assert model(torch.ones(1, 3))["hidden"].dtype is torch.float32
    assert model.seen == [torch.float32]
    bf16.unwrap_forward(model)


def test_wrapping_by_another_precision_is_refused() -> None:
    model = Model()
    precision("bf16", device=CPU).wrap_forward(model)
    with pytest.raises(
        ConfigError, match=r"`Model` computes in bf16 already, and would now compute in fp16.*unwrap_forward"
    ):
        precision("fp16", device=CPU).wrap_forward(model)


def test_a_deep_copy_runs_the_copy() -> None:
    model, bf16 = Model(), precision("bf16", device=CPU)
    bf16.wrap_forward(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.linear.weight.zero_()
        twin.linear.bias.fill_(7.0)
    assert twin(torch.ones(1, 3))["hidden"].tolist() == [[7.0, 7.0]]
    assert twin.seen == [torch.bfloat16]
    assert model.seen == []
    assert bf16.unwrap_forward(twin)(torch.ones(1, 3))["n"] == 1
    assert twin.seen == [torch.bfloat16, torch.float32]


def test_a_forward_of_the_instance_itself_is_kept_and_given_back() -> None:
    def forward(self: Model, inputs: torch.Tensor, scale: float = 3.0) -> torch.Tensor:
        return self.linear(inputs) * 0 + scale

    model, bf16 = Model(), precision("bf16", device=CPU)
    mine = types.MethodType(forward, model)
    model.forward = mine  # type: ignore[method-assign, assignment]
    bf16.wrap_forward(model)
    assert list(inspect.signature(model.forward).parameters) == ["inputs", "scale"]
    assert model(torch.ones(1, 3), scale=5.0).dtype is torch.float32
    twin = copy.deepcopy(model)
    twin.linear = nn.Linear(1, 1)
    assert twin(torch.ones(2, 1)).shape == (2, 1)
    bf16.unwrap_forward(model)
    assert model.__dict__["forward"] is mine
    assert "_forward_before_precision" not in model.__dict__


def test_a_pickled_model_arrives_unwrapped_and_whole() -> None:
    model = precision("bf16", device=CPU).wrap_forward(nn.Linear(2, 2))
    arrived = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        arrived.weight.zero_()
        arrived.bias.fill_(1.001)
    assert torch.equal(arrived(torch.ones(1, 2)), torch.full((1, 2), 1.001))


@dataclass
class Output:
    logits: torch.Tensor
    twice: torch.Tensor


class Structured(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.kind = kind

    def forward(self, inputs: torch.Tensor) -> Any:
        logits = self.linear(inputs)
        if self.kind is Output:
            return Output(logits, logits * 2)
        return {"logits": logits, "parts": [(logits * 2, 2)]} if self.kind is dict else logits


@pytest.mark.parametrize("kind", [torch.Tensor, dict])
def test_compile_takes_the_casts_along_in_one_graph(kind: type) -> None:
    model = precision("bf16", device=CPU).wrap_forward(Structured(kind))
    expected = tensor_leaves(model(torch.ones(4, 3)))
    outputs = tensor_leaves(torch.compile(model, backend="eager", fullgraph=True)(torch.ones(4, 3)))
    assert [each.dtype for each in outputs] == [torch.float32] * len(expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))
    assert torch.equal(outputs[0], outputs[0].bfloat16().float())


def test_compile_of_a_model_with_outputs_of_its_own_kind() -> None:
    model = precision("bf16", device=CPU).wrap_forward(Structured(Output))
    outputs = torch.compile(model, backend="eager")(torch.ones(4, 3))
    assert isinstance(outputs, Output)
    assert outputs.logits.dtype is outputs.twice.dtype is torch.float32
    assert torch.equal(outputs.logits, outputs.logits.bfloat16().float())


def test_a_compiled_model_can_be_wrapped_too() -> None:
    model = nn.Linear(3, 2)
    compiled = torch.compile(model, backend="eager")
    bf16 = precision("bf16", device=CPU)
    assert bf16.wrap_forward(compiled) is compiled  # type: ignore[arg-type]
    outputs = compiled(torch.ones(1, 3))
    assert outputs.dtype is torch.float32
    assert torch.equal(outputs, outputs.bfloat16().float())


def test_children_may_be_wrapped_by_themselves() -> None:
    model, bf16 = Model(), precision("bf16", device=CPU)
    bf16.wrap_forward(model.linear)
    model(torch.ones(1, 3))
    assert model.seen == [torch.float32]
    assert torch.equal(model(torch.ones(1, 3))["double"], model.linear(torch.ones(1, 3)).double())
    bf16.wrap_forward(model)
    assert "forward" in model.__dict__


def test_the_context_alone_casts() -> None:
    fp16 = precision("fp16", device=CPU)
    linear = nn.Linear(2, 2)
    with fp16.forward_context():
        assert linear(torch.ones(1, 2)).dtype is torch.float16
        with fp16.forward_context():
            assert linear(torch.ones(1, 2)).dtype is torch.float16
    assert linear(torch.ones(1, 2)).dtype is torch.float32


def test_autocast_settings_reach_autocast() -> None:
    linear = nn.Linear(2, 2)
    with precision("bf16", device=CPU, autocast=AutocastKwargs(cache_enabled=False)).forward_context():
        assert not torch.is_autocast_cache_enabled()
        assert linear(torch.ones(1, 2)).dtype is torch.bfloat16
    with precision("bf16", device=CPU, autocast=AutocastKwargs(enabled=False)).forward_context():
        assert linear(torch.ones(1, 2)).dtype is torch.float32


def test_full_precision_touches_nothing() -> None:
    model, full = Model(), precision("no", device=CPU)
    before = dict(model.__dict__)
    assert isinstance(full, FullPrecision)
    assert full.wrap_forward(model) is model
    assert full.unwrap_forward(model) is model
    assert model.__dict__ == before
    full.check(model.half())
    with full.forward_context():
        assert not torch.is_autocast_enabled("cpu")


def test_float16_parameters_are_refused_by_name() -> None:
    model = Model()
    fp16 = precision("fp16", device=CPU)
    fp16.check(model)
    model.linear.half()
    with pytest.raises(
        ConfigError, match=r"`encoder\.linear\.weight` \(and 1 more\) is float16.*would vanish.*model\.float\(\)"
    ):
        fp16.check(model, name="encoder")
    precision("bf16", device=CPU).check(model)
    model.requires_grad_(False)
    fp16.check(model)


def test_outputs_stay_where_the_policy_names_no_dtype_for_them() -> None:
    bare = MixedPrecision(DTypePolicy(compute_dtype=torch.bfloat16), name="bf16", device=CPU)
    assert bare.wrap_forward(nn.Linear(2, 2))(torch.ones(1, 2)).dtype is torch.bfloat16


def test_a_device_without_autocast_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.autocast, and torch .* has none for the device 'meta'.*'no'"):
        MixedPrecision(DTypePolicy(), name="bf16", device=torch.device("meta"))


@pytest.mark.parametrize("name", ["no", "bf16", "fp16"])
def test_precisions_fit_the_protocol(name: str) -> None:
    assert isinstance(precision(name, device=CPU), Precision)
