"""What counts as a repeated unit of a model: by class, by size, by the model's own list, or by repetition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accel_state.blocks import find_blocks, outermost
from accel_state.errors import ConfigError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mlp(hidden)
        return result


class Wide(Layer):
    pass


class Model(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer(), Wide()])
        self.head = nn.Linear(4, 10, bias=tie)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def names(model: nn.Module, **options: object) -> list[str]:
    return [name for name, _ in find_blocks(model, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [Layer, "Layer", ["Layer"], (Layer, "Wide")])
def test_by_class_with_subclasses_and_on_the_meta_device(classes: object) -> None:
    with torch.device("meta"):
        model = Model()
    assert names(model, classes=classes) == ["layers.0", "layers.1", "layers.2"]
    assert dict(find_blocks(model, classes=classes))["layers.1"] is model.layers[1]  # type: ignore[arg-type]


def test_a_block_comes_before_those_inside_it() -> None:
    found = find_blocks(Model(), classes=["Sequential", Layer])
    assert [name for name, _ in found][:4] == ["layers.0", "layers.0.mlp", "layers.1", "layers.1.mlp"]
    assert [name for name, _ in outermost(found)] == ["layers.0", "layers.1", "layers.2"]
    assert outermost(reversed(found)) == outermost(found)[::-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"classes": "LlamaLayer"}, "No module of `Model` that is called has the class `LlamaLayer`.*`Layer`; give"),
        ({"classes": nn.Conv2d}, "has the class `Conv2d`"),
        ({"classes": "ModuleList"}, "has the class `ModuleList`"),
        ({"classes": Model}, "`Model` is the class of the whole model"),
        ({"classes": []}, "with an empty list"),
        ({"classes": "Layer", "min_num_params": 5}, r"both by class \(`Layer`\) and by size \(`min_num_params=5`\)"),
        ({"min_num_params": 0}, "`min_num_params=0` is not a number of parameters"),
        ({"min_num_params": 1e6}, "`min_num_params=1000000.0` is not a number of parameters"),
        ({"min_num_params": True}, "`min_num_params=True` is not a number of parameters"),
    ],
)
def test_what_can_be_no_block_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        names(Model(), **given)


def test_a_model_without_parts_has_no_class_to_name() -> None:
    with pytest.raises(ConfigError, match="It has no parts"):
        names(nn.Linear(2, 2), classes="Layer")


def test_by_size_the_smallest_that_are_large_enough() -> None:
    # A layer has 80 parameters in its attention (whose parts nobody calls) and 40 + 36 in its mlp.
    assert names(Model(), min_num_params=40)[:3] == ["embedding", "layers.0.attention", "layers.0.mlp.0"]
    assert names(Model(), min_num_params=41)[:4] == ["layers.0.attention", "layers.0.mlp", "layers.1.attention",
                                                     "layers.1.mlp"]  # fmt: skip
    assert names(Model(), min_num_params=81) == ["layers.0", "layers.1", "layers.2"]
    assert names(Model(), min_num_params=10_000) == []


def test_by_size_a_tied_parameter_is_in_no_two_blocks() -> None:
    for least in (40, 10):  # the head has 10 that are its own
        found = names(Model(tie=True), min_num_params=least)
        assert "embedding" not in found
        assert "head" not in found
        assert "layers.0.mlp.0" in found


def test_the_models_own_list_through_wrappers() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.base_model = inner

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    model = Model()
    for spelled in (["Layer", "NotHere"], {"Layer"}, "Layer"):
        model._no_split_modules = spelled  # type: ignore[assignment, unused-ignore]
        assert names(Wrapper(model)) == [f"base_model.layers.{index}" for index in range(3)]
    model._no_split_modules = ["Wide"]  # type: ignore[assignment, unused-ignore]
    assert names(model) == ["layers.2"]


@pytest.mark.parametrize("absent", [None, [], {"NotHere"}])
def test_without_such_a_list_members_that_repeat(absent: object) -> None:
    model = Model()
    model._no_split_modules = absent  # type: ignore[assignment, unused-ignore]
    assert names(model) == ["layers.0", "layers.1", "layers.2"]  # though the third is of a class of its own


def test_repetition_in_each_kind_of_holder_nested_and_without_parameters() -> None:
    def two() -> tuple[nn.Module, nn.Module]:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    model = nn.Module()
    model.nested = nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer(), Layer()])])
    model.numbered = nn.ModuleDict({"0": Layer(), "1": Layer()})
    model.named = nn.ModuleDict({"words": nn.Embedding(2, 2), "places": nn.Embedding(2, 2)})
    model.inner = nn.Sequential(*two())
    model.bare = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    model.ends = nn.Sequential(nn.Embedding(2, 2), Layer(), Layer(), nn.Linear(2, 2))
    model.different = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.ReLU()))
    model.one = nn.ModuleList([nn.Linear(2, 2)])
    nested = [f"nested.{stage}.{index}" for stage in range(2) for index in range(2)]
    assert names(model) == [*nested, "numbered.0", "numbered.1", "inner.0", "inner.1", "ends.1", "ends.2"]
    assert names(nn.Linear(2, 2)) == []


sizes = st.recursive(
    st.integers(1, 30).map(lambda size: nn.Linear(size, 1, bias=False)),
    lambda children: st.lists(children, min_size=1, max_size=4).map(lambda parts: nn.Sequential(*parts)),
    max_leaves=12,
)


@given(model=sizes, least=st.integers(1, 60))
def test_by_size_every_block_is_large_enough_by_itself_and_nothing_is_left_that_would_do(
    model: nn.Module, least: int
) -> None:
    found = dict(find_blocks(model, min_num_params=least))
    owned = {name: {id(parameter) for parameter in block.parameters()} for name, block in found.items()}
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for name, mine in owned.items():
        inner = {each for other, theirs in owned.items() if other.startswith(name + ".") for each in theirs}
        assert sum(sizes[each] for each in mine - inner) >= least
    everything = {each for mine in owned.values() for each in mine}
    for name, module in model.named_modules():
        if name and name not in found:
            assert sum(sizes[id(each)] for each in module.parameters() if id(each) not in everything) < least
