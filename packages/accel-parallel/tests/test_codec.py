"""States of any shape survive being written, and what cannot be written is named."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from accel_parallel.checkpoint import About, Item, write_checkpoint
from accel_parallel.checkpoint.codec import decode, encode
from accel_state import CheckpointError


def through(tree: Any) -> Any:
    """What comes back from a file."""
    value, tensors = encode(tree, item="it")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return decode(json.loads(json.dumps(value, allow_nan=False)), copies, item="it")


def same(first: Any, second: Any) -> bool:
    """Equal in value and type, all the way down; NaN equals NaN."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, float):
        if first != first:
            return second != second  # the sign of NaN says nothing
        return first == second and math.copysign(1, first) == math.copysign(1, second)
    if isinstance(first, dict):
        pairs = zip(first.items(), second.items(), strict=False)
        return len(first) == len(second) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


KEYS = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.none(), st.sampled_from(["$tensor", "$", "a.b"]))
TENSORS = st.sampled_from([torch.zeros(()), torch.ones(2, 3), torch.tensor([True]), torch.empty(0, dtype=torch.int16)])
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(torch.bfloat16), TENSORS
)
HASHABLE = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.tuples(st.integers(), st.text(max_size=2)))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.sets(HASHABLE, max_size=3),
        st.frozensets(HASHABLE, max_size=3),
        st.lists(st.integers(0, 3)).map(Counter),
    ),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=300, deadline=None)
def test_every_tree_comes_back(tree: Any) -> None:
    assert same(through(tree), tree)


def test_paths_that_spell_alike_stay_apart() -> None:
    tree = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    assert same(through(tree), tree)


def test_keys_may_be_frozen_sets_and_tuples() -> None:
    tree = {frozenset({1}): "a", (1, 2): "b"}
    assert same(through(tree), tree)


def test_numpy_scalars_become_numbers() -> None:
    back = through([np.float32(0.5), np.int64(3), np.bool_(True), np.float64("nan")])
    assert same(back, [0.5, 3, True, float("nan")])


def test_other_mappings_become_dicts() -> None:
    assert same(through(OrderedDict(a=1)), {"a": 1})


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Colour.RED, "Colour"),
        (b"raw", "bytes"),
        (1 + 2j, "complex"),
        (np.zeros(2), "ndarray"),
        (object(), "object"),
        (print, "builtin_function"),
    ],
)
def test_what_is_neither_json_nor_tensor_is_named_by_its_path(value: object, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"`custom\.groups\.1\.deep` is a .*{name}"):
        encode({"groups": [0, {"deep": value}]}, item="custom")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"$later": 1}, "`it` holds the mark `\\$later`"),
        ({"$dtype": "float3"}, "the dtype `float3`"),
        ({"$dtype": "load"}, "the dtype `load`"),
        ({"$tensor": "gone"}, "refers to the tensor `gone`"),
    ],
)
def test_marks_that_mean_nothing_here_are_refused(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decode([value], {}, item="it")


def optimizers() -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}),
        "AdamW": (AdamW, {"amsgrad": True}),
        "Adagrad": (Adagrad, {}),
        "LBFGS": (LBFGS, {"max_iter": 3, "line_search_fn": "strong_wolfe"}),
    }


@pytest.mark.parametrize("name", optimizers())
def test_states_of_optimizers_come_back_and_go_on_alike(name: str, tmp_path: Path) -> None:
    make, settings = optimizers()[name]
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = make(model.parameters(), **settings)

    def step(which: nn.Module, by: Any) -> None:
        def closure() -> torch.Tensor:
            by.zero_grad()
            loss = which(torch.ones(1, 3)).square().sum()
            loss.backward()
            return loss

        by.step(closure)

    for _ in range(3):
        step(model, optimizer)
    state = through(optimizer.state_dict())
    assert same(state, optimizer.state_dict())
    about = About(step=3, strategy="any")
    write_checkpoint(tmp_path / "run", [Item("optimizer", "optimizer", optimizer.state_dict())], about=about)
    twin.load_state_dict(model.state_dict())
    restored = make(twin.parameters(), **settings)
    restored.load_state_dict(state)
    step(model, optimizer)
    step(twin, restored)
    assert torch.equal(model.weight, twin.weight)


SCHEDULERS = {
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=20),
    "MultiStepLR": lambda o: MultiStepLR(o, milestones=[2, 2, 5]),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 9)], milestones=[4]),
    "LambdaLR": lambda o: LambdaLR(o, lambda count: 0.9**count),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_states_of_schedulers_come_back_and_go_on_alike(name: str) -> None:
    made = []
    for _ in range(2):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
        made.append((optimizer, SCHEDULERS[name](optimizer)))
    arguments = [(1.0,)] * 9 if name == "ReduceLROnPlateau" else [()] * 9
    (optimizer, scheduler), (other, restored) = made
    for given_ in arguments[:5]:
        optimizer.step()
        scheduler.step(*given_)
    state = through(scheduler.state_dict())
    restored.load_state_dict(state)
    other.load_state_dict(through(optimizer.state_dict()))
    for given_ in arguments[5:]:
        for each, by in made:
            each.step()
            by.step(*given_)
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert same(through(restored.state_dict()), through(scheduler.state_dict()))
