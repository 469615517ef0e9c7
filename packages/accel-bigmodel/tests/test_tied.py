"""Tied parameters: found by identity and by memory, tied again, and never at the cost of values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from accel_bigmodel import find_tied_parameters, init_empty_weights, retie_parameters
from accel_state.errors import ConfigError


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.body[1].bias = self.body[0].bias


GROUPS = [["embed.weight", "head.weight"], ["body.0.bias", "body.1.bias"]]


def test_a_model_without_ties() -> None:
    assert find_tied_parameters(nn.Transformer(8, 2, 1, 1, batch_first=True)) == []
    assert find_tied_parameters(nn.Linear(2, 2, bias=False)) == []
    assert find_tied_parameters(nn.BatchNorm1d(3)) == []


def test_ties_are_found_real_and_empty() -> None:
    assert find_tied_parameters(Language()) == GROUPS
    with init_empty_weights():
        model = Language()
    assert find_tied_parameters(model) == GROUPS


def test_a_module_used_twice_is_tied_with_itself() -> None:
    layer = nn.Linear(2, 2)
    assert find_tied_parameters(nn.Sequential(layer, nn.ReLU(), layer)) == [
        ["0.weight", "2.weight"],
        ["0.bias", "2.bias"],
    ]


def test_ties_by_memory() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    model = nn.Sequential(first, second)
    assert find_tied_parameters(model) == [["0.weight", "1.weight"]]
    second.weight = nn.Parameter(first.weight.data.t())
    assert find_tied_parameters(model) == []


def test_parts_of_one_buffer_are_not_tied() -> None:
    flat = torch.zeros(8)
    model = nn.Module()
    model.a, model.b = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    model.overlap = nn.Parameter(flat[:2])
    assert find_tied_parameters(model) == []


def test_buffers_are_found_and_kept_apart_from_parameters() -> None:
    model, shared = nn.Module(), torch.ones(3)
    model.child = nn.Module()
    model.register_buffer("mask", shared)
    model.child.register_buffer("mask", shared)
    model.weight = nn.Parameter(shared)
    assert find_tied_parameters(model) == [["mask", "child.mask"]]


def test_empty_tensors_are_not_tied_by_their_address() -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    assert find_tied_parameters(model) == []


def test_tensors_without_memory_of_their_own_are_told_apart() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.eye(3).to_sparse())
    model.b = model.a
    model.c = nn.Parameter(torch.eye(3).to_sparse())
    assert find_tied_parameters(model) == [["a", "b"]]


def test_released_memory_is_no_tie() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    for each in model.parameters():
        each.untyped_storage().resize_(0)
    assert find_tied_parameters(model) == []


def test_retying_after_loading_in_place_of_meta() -> None:
    with init_empty_weights():
        model = Language()
    groups = find_tied_parameters(model)
    state = Language().state_dict()
    del state["embed.weight"]
    model.load_state_dict(state, assign=True, strict=False)
    assert model.embed.weight.device.type == "meta"
    retie_parameters(model, groups)
    assert model.embed.weight is model.head.weight
    assert torch.equal(model.embed.weight, state["head.weight"])
    assert model.body[0].bias is model.body[1].bias
    assert find_tied_parameters(model) == GROUPS


def test_retying_equal_copies_gives_their_gradient_to_one() -> None:
    model = Language()
    for name in ("head", "embed"):
        getattr(model, name).weight = nn.Parameter(getattr(model, name).weight.detach().clone())
    assert len(find_tied_parameters(model)) == 1
    retie_parameters(model, GROUPS)
    model.head(model.embed(torch.tensor([1]))).sum().backward()
    assert model.embed.weight.grad is model.head.weight.grad


def test_retying_on_meta_and_over_an_absent_one() -> None:
    with init_empty_weights():
        model = Language()
    model.head.weight = None  # type: ignore[assignment]
    retie_parameters(model, GROUPS)
    assert model.head.weight is model.embed.weight
    nothing = nn.Linear(1, 1, bias=False)
    retie_parameters(nothing, [["bias"]])
    assert nothing.bias is None


def test_retying_buffers() -> None:
    model, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    both = nn.Sequential(model, other)
    retie_parameters(both, [["0.running_mean", "1.running_mean"]])
    assert other.running_mean is model.running_mean


def test_different_values_are_not_thrown_away() -> None:
    model = Language()
    model.head.weight = nn.Parameter(model.embed.weight.detach() + 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ConfigError, match=r"'embed\.weight' and 'head\.weight'.*hold different values.*Load one of them"
    ):
        retie_parameters(model, GROUPS)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize(
    "other", [nn.Parameter(torch.zeros(7, 4).double()), nn.Parameter(torch.zeros(4, 7))], ids=["dtype", "shape"]
)
def test_different_tensors_cannot_be_tied(other: nn.Parameter) -> None:
    model = Language()
    model.head.weight = other
    with pytest.raises(
        ConfigError, match=r"'embed\.weight' \(parameter, torch\.float32, \[7, 4\]\) and 'head\.weight'.*untied"
    ):
        retie_parameters(model, GROUPS)


@pytest.mark.parametrize("name", ["haed.weight", "head.wieght", "body.0.bias.x"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"was to be tied, but the Language has no parameter or buffer.*Did you mean"):
        retie_parameters(Language(), [["embed.weight", name]])
