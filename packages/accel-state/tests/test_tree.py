"""Nested structures keep their types, and themselves where nothing changes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from accel_state import (
    ConfigError,
    concatenate,
    convert_to_fp32,
    find_batch_size,
    find_device,
    map_tensors,
    send_to_device,
    slice_tensors,
    tensor_leaves,
    tree_signature,
)

Point = namedtuple("Point", "x y")


@dataclasses.dataclass(frozen=True)
class Batch:
    ids: torch.Tensor
    name: str = "batch"
    length: int = dataclasses.field(default=0, init=False)


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """Keeps its entries as attributes too, and cannot be made from a dict alone."""

    def __init__(self, *, logits: torch.Tensor) -> None:
        super().__init__()
        self["logits"] = logits

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __reduce__(self) -> Any:
        return _model_output, (self["logits"],)


def _model_output(logits: torch.Tensor) -> ModelOutput:
    return ModelOutput(logits=logits)


class Encoding(UserDict):  # type: ignore[type-arg]
    """A tokenizer's batch: it moves itself, and does not know `non_blocking`."""

    def to(self, device: str) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.data.items()})


tensors = st.integers(0, 3).map(lambda rows: torch.arange(rows * 2).reshape(rows, 2))
leaves = st.one_of(tensors, st.none(), st.text(max_size=3), st.integers())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
    ),
    max_leaves=8,
)


@given(trees)
def test_identity_gives_the_same_object(tree: Any) -> None:
    assert map_tensors(tree, lambda tensor: tensor) is tree
    assert send_to_device(tree, "cpu") is tree
    assert convert_to_fp32(tree) is tree


@given(trees)
def test_structure_and_order_survive(tree: Any) -> None:
    mapped = map_tensors(tree, lambda tensor: tensor + 1)
    assert tree_signature(mapped) == tree_signature(tree)
    for new, old in zip(tensor_leaves(mapped), tensor_leaves(tree), strict=True):
        assert torch.equal(new, old + 1)


@given(trees)
def test_slices_join_to_the_whole(tree: Any) -> None:
    parts = [slice_tensors(tree, slice(0, 1)), slice_tensors(tree, slice(1, None))]
    joined = concatenate(parts)
    assert tree_signature(joined) == tree_signature(tree)
    for new, old in zip(tensor_leaves(joined), tensor_leaves(tree), strict=True):
        assert torch.equal(new, old)


def test_types_are_kept() -> None:
    one = torch.ones(2)
    counts: defaultdict[str, Any] = defaultdict(list, a=one)
    mapped = map_tensors([counts, MappingProxyType({"a": one}), torch.max(one, 0)], lambda tensor: tensor * 2)
    assert mapped[0].default_factory is list
    assert mapped[0]["a"].tolist() == [2, 2]
    assert type(mapped[1]) is MappingProxyType
    assert type(mapped[2]).__name__ == "max"
    assert mapped[2].values.item() == 2
    assert counts["a"] is one


def test_dataclasses_are_rebuilt_frozen_or_not() -> None:
    batch = Batch(torch.ones(2))
    mapped = map_tensors(batch, lambda tensor: tensor * 2)
    assert type(mapped) is Batch
    assert (mapped.ids.tolist(), mapped.name, mapped.length) == ([2, 2], "batch", 0)
    assert batch.ids.tolist() == [1, 1]
    assert map_tensors(Batch, lambda tensor: tensor) is Batch


def test_model_outputs_keep_attributes() -> None:
    mapped = map_tensors(ModelOutput(logits=torch.ones(1)), lambda tensor: tensor * 2)
    assert type(mapped) is ModelOutput
    assert mapped.logits is mapped["logits"]
    assert mapped.logits.item() == 2


def test_objects_move_themselves() -> None:
    encoding = Encoding(ids=torch.ones(2))
    moved = send_to_device([encoding], "meta", non_blocking=True)[0]
    assert type(moved) is Encoding
    assert moved["ids"].device.type == "meta"
    packed = pack_sequence([torch.ones(2)])
    assert isinstance(send_to_device(packed, "cpu"), PackedSequence)


def test_skipped_keys_stay() -> None:
    tree = {"a": torch.ones(1), "deep": [{"b": torch.ones(1)}], "encoding": Encoding(b=torch.ones(1))}
    moved = send_to_device(tree, "meta", skip_keys=("b",))
    assert moved["a"].device.type == "meta"
    assert moved["deep"] is tree["deep"]
    assert moved["encoding"] is tree["encoding"]


def test_first_tensor_tells_batch_size_and_device() -> None:
    tree = {"scale": torch.tensor(1.0, device="meta"), "x": [torch.ones(3, 2)]}
    assert find_batch_size(tree) == 3
    assert find_device(tree) == torch.device("meta")
    assert find_batch_size(["text", None]) is None
    assert find_device([]) is None


def test_half_becomes_float32() -> None:
    tree = [torch.ones(1, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)]
    kinds = [leaf.dtype for leaf in convert_to_fp32(tree)]
    assert kinds == [torch.float32, torch.float32, torch.float64, torch.int8]


def test_signature_is_json_by_path() -> None:
    tree = {"ids": torch.ones(2, 3), "more": [torch.tensor(True), "x"]}
    assert tree_signature(tree) == {
        "": "dict[2]",
        ".ids": "float32[2, 3]",
        ".more": "list[2]",
        ".more[0]": "bool[]",
        ".more[1]": "str",
    }
    assert tree_signature(tree, free_dim=-1)[".ids"] == "float32[2, *]"


def test_other_leaves_come_with_their_path() -> None:
    seen: list[tuple[Any, str]] = []
    map_tensors({"a": [1, torch.ones(1)]}, lambda tensor: tensor, on_other=lambda leaf, path: seen.append((leaf, path)))
    assert seen == [(1, ".a[0]")]


def test_scalars_are_joined_to_a_row() -> None:
    assert concatenate([torch.tensor(1), torch.tensor(2)]).tolist() == [1, 2]
    assert concatenate([torch.ones(2, 1), torch.ones(2, 2)], dim=1).shape == (2, 3)


@pytest.mark.parametrize(
    ("trees", "match"),
    [
        ([], "No tree was given"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], r"differ at the top \(\['a'\]; \['b'\]\)"),
        ([{"a": [torch.ones(1), 1]}, {"a": [torch.ones(1), 2]}], r"differ at \.a\[1\] \(1, 2\)"),
        ([{"a": torch.ones(1)}, {"a": None}], r"differ at \.a \(Tensor, NoneType\)"),
        ([[1], [1, 2]], "differ at the top"),
    ],
)
def test_different_trees_are_not_joined(trees: list[Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        concatenate(trees)
