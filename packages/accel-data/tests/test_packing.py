"""Trees taken apart and put together again, in one process."""

from __future__ import annotations

import struct
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_data.packing import SMALL_BYTES, pack, unpack
from accel_state.errors import ConfigError
from accel_state.tree import tensor_leaves

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
LARGE = SMALL_BYTES + 1

Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Sample:
    pixels: Any
    label: Any = None


class Output(OrderedDict[str, Any]):
    """A mapping of its own kind, with attributes."""

    note = "kept"


def there(tree: Any) -> Any:
    """Through bytes and back, memory of large tensors filled after the tree was built, as by a transport."""
    packed = pack(tree)
    posted: list[torch.Tensor] = []
    row = torch.cat(packed.small) if packed.small else torch.empty(0, dtype=torch.uint8)
    made = unpack(packed.skeleton, row.clone(), posted.append)
    for data, sent in zip(posted, packed.large, strict=True):
        data.copy_(sent)
    return made


def raw(tensor: torch.Tensor) -> list[int]:
    """Its values bit by bit, in order of index."""
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    bits: list[int] = plain.view(-1).view(torch.uint8).tolist()
    return bits


def assert_same(found: Any, given: Any) -> None:
    assert type(found) is type(given)
    if isinstance(given, torch.Tensor):
        assert (found.dtype, found.shape) == (given.dtype, given.shape)
        assert raw(found) == raw(given)
    elif isinstance(given, dict):
        assert list(found) == list(given)
        for key in given:
            assert_same(found[key], given[key])
    elif isinstance(given, (list, tuple)):
        assert len(found) == len(given)
        for new, old in zip(found, given, strict=True):
            assert_same(new, old)
    elif isinstance(given, Sample):
        assert_same([found.pixels, found.label], [given.pixels, given.label])
    else:
        assert found == given


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    if draw(st.integers(0, 9)) == 0:
        shape = [LARGE, *shape]
    size = torch.Size(shape).numel()
    made = torch.arange(size, dtype=torch.int32).remainder(97).to(torch.float32).to(dtype).view(shape)
    order = draw(st.permutations(range(len(shape))))
    made = made.permute(order)
    return made[..., ::2] if draw(st.booleans()) and made.dim() else made


others = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.binary(max_size=3), st.sets(st.integers()))
trees = st.recursive(
    st.one_of(tensors(), others),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.dictionaries(st.text(max_size=2), children, max_size=3),
        st.builds(Pair, children, children),
        st.builds(Sample, children, children),
        st.dictionaries(st.text(max_size=2), children, max_size=2).map(Output),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree_comes_back_bit_by_bit_in_memory_of_its_own(tree: Any) -> None:
    found = there(tree)
    assert_same(found, tree)
    storages = [each.untyped_storage() for each in tensor_leaves(found) if each.numel()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    sizes = [each.numel() * each.element_size() for each in tensor_leaves(found) if each.numel()]
    assert [storage.nbytes() for storage in storages] == sizes
    for each in tensor_leaves(found):
        each.zero_()


def test_a_large_tensor_is_sent_out_of_its_own_memory_and_a_small_one_in_the_row() -> None:
    large, small = torch.zeros(LARGE, dtype=torch.uint8), torch.zeros(SMALL_BYTES, dtype=torch.uint8)
    packed = pack({"large": large, "small": small})
    assert [each.data_ptr() for each in packed.large] == [large.data_ptr()]
    assert [each.numel() for each in packed.small] == [SMALL_BYTES]


def test_a_dense_tensor_in_another_order_of_dims_is_not_copied_and_keeps_it() -> None:
    image = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert [each.data_ptr() for each in pack(image).large] == [image.data_ptr()]
    found = there(image)
    assert found.stride() == image.stride()
    assert torch.equal(found, image)


def test_what_shares_memory_with_a_kept_tensor_is_copied() -> None:
    whole = torch.zeros(4 * LARGE, dtype=torch.uint8)
    kept, overlapping, beside = whole[: 2 * LARGE], whole[LARGE : 3 * LARGE], whole[2 * LARGE :]
    packed = pack([overlapping, beside], apart_from=[kept])
    assert packed.large[0].data_ptr() != overlapping.data_ptr()
    assert packed.large[1].data_ptr() == beside.data_ptr()


def test_lazy_conjugates_and_negatives_are_carried_out() -> None:
    number = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(there(number.conj()), number.conj())
    assert torch.equal(there(number.conj().imag), number.conj().imag)


def test_requires_grad_is_kept_and_history_is_not() -> None:
    leaf = torch.ones(3, requires_grad=True)
    found = there([leaf, leaf * 2])
    assert [each.requires_grad for each in found] == [True, True]
    assert found[1].is_leaf


def test_a_tensor_in_shared_memory_arrives_in_private_memory() -> None:
    found = there(torch.arange(5).share_memory_())  # type: ignore[no-untyped-call]
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert not found.is_shared()


def test_a_tensor_of_a_class_of_its_own_keeps_it() -> None:
    found = there(torch.nn.Parameter(torch.ones(2)))
    assert type(found) is torch.nn.Parameter
    assert found.tolist() == [1, 1]


def test_the_skeleton_is_the_same_for_batches_that_differ_in_values_only() -> None:
    assert pack({"x": torch.zeros(3), "n": 1}).skeleton == pack({"x": torch.ones(3), "n": 1}).skeleton
    assert pack({"x": torch.zeros(3), "n": 1}).skeleton != pack({"x": torch.zeros(3), "n": 2}).skeleton
    assert pack(torch.zeros(3)).skeleton != pack(torch.zeros(3, dtype=torch.int32)).skeleton


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: torch.eye(2).to_sparse(), "cpu sparse_coo tensor of torch.float32"),
        (lambda: torch.empty(2, device="meta"), "meta strided tensor"),
    ],
)
def test_a_tensor_without_plain_memory_is_refused(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"Rank 0 read a {named}.*\.to_dense\(\)"):
        pack({"x": make()})


def test_a_leaf_that_cannot_be_pickled_is_named_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"a function at \.meta\[1\] of a batch, which cannot be pickled"):
        pack({"x": torch.zeros(2), "meta": [1, lambda: None]})


def test_values_of_every_bit_pattern_survive() -> None:
    nans = torch.frombuffer(
        bytearray(struct.pack("<4I", 0x7FC00001, 0xFFC00000, 0x7F800001, 0x80000000)), dtype=torch.float32
    )
    assert raw(there(nans)) == raw(nans)
