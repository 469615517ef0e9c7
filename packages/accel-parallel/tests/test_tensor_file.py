"""Files of tensors: written for any reader, read part by part, and refused where they are odd."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel_parallel.box import Box
from accel_parallel.checkpoint.folder import LocalFolder
from accel_parallel.checkpoint.tensor_file import TensorFile
from accel_state import CheckpointError
from accel_state.tensor_format import TensorShape, bytes_of, file_header, order_in_file

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
LESS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of random bits."""
    size = torch.Size(shape).numel()
    if not size:
        return torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    most = 2 if dtype == torch.bool else 256
    raw = torch.randint(most, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    flat = tensor.contiguous().reshape(-1)
    return tuple(tensor.shape), tensor.dtype, flat.view(torch.uint8).tolist() if flat.numel() else []


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """As a checkpoint does."""
    shapes = {name: TensorShape(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    path.write_bytes(file_header(shapes) + b"".join(bytes_of(tensors[name]) for name in order_in_file(shapes)))
    return path


def opened(path: Path) -> TensorFile:
    return TensorFile(LocalFolder(path.parent), path.name)


@given(st.dictionaries(st.text(max_size=8), st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6))
@LESS
def test_the_library_reads_what_is_written_and_the_other_way_round(
    content: dict[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    content.pop("__metadata__", None)
    tensors = {name: made(*of, seed) for seed, (name, of) in enumerate(content.items())}
    expected = {name: bits(tensor) for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours = write(Path(folder, "ours.safetensors"), tensors)
        assert {name: bits(tensor) for name, tensor in load_file(ours).items()} == expected
        with safe_open(ours, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        theirs = Path(folder, "theirs.safetensors")
        save_file(tensors, theirs, metadata={"by": "another"})
        for path in (ours, theirs):
            assert {name: bits(each.read()) for name, each in opened(path).tensors().items()} == expected
            assert {name: bits(each.view()) for name, each in opened(path).tensors().items()} == expected


@given(SHAPES, st.sampled_from(DTYPES), st.data())
@LESS
def test_a_box_is_what_slicing_gives(shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject) -> None:
    whole = made(shape, dtype)
    offset = tuple(data.draw(st.integers(0, size)) for size in shape)
    part = tuple(data.draw(st.integers(0, size - begin)) for size, begin in zip(shape, offset, strict=True))
    box = Box(offset, part)
    with tempfile.TemporaryDirectory() as folder:
        stored = opened(write(Path(folder, "file"), {"before": torch.ones(3), "it": whole})).tensors()["it"]
        found = stored.read(box)
        if found.numel():
            found.reshape(-1).view(torch.uint8).fill_(1)  # memory of its own
        again = stored.read(box)
    assert again.is_contiguous()
    assert bits(again) == bits(whole[box.slices])


@pytest.mark.parametrize("padding", range(8))
def test_a_header_of_any_length_is_read(tmp_path: Path, padding: int) -> None:
    # Other writers may pad it to no multiple of anything; values then lie at odd places.
    whole = made((3, 5), torch.float64)
    data = write(tmp_path / "file", {"it": whole}).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip() + b" " * padding
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    stored = opened(tmp_path / "file").tensors()["it"]
    assert bits(stored.read()) == bits(whole)
    assert bits(stored.read(Box((1, 2), (2, 2)))) == bits(whole[1:3, 2:4])


def test_values_begin_where_their_elements_may(tmp_path: Path) -> None:
    tensors = {str(dtype): made((3,), dtype) for dtype in DTYPES}
    file = opened(write(tmp_path / "file", tensors))
    assert all(begin % shape.dtype.itemsize == 0 for shape, begin in file.entries.values())


# What is refused


def entry(*shape: Any, begin: Any = 0, end: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    """Of a header, for a tensor that takes the 8 bytes that there are unless something else is said."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, 8 if end is None else end]}


HEADERS: dict[str, tuple[Any, str]] = {
    "no object": ([], "has no attribute 'items'"),
    "a number": ({"a": 3}, "not subscriptable"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "'dtype'"),
    "a dtype of nobody": ({"a": entry(2, dtype="F12")}, r"torch .* has no dtype F12"),
    "a dtype that is a list": ({"a": entry(2, dtype=[])}, "unhashable"),
    "a function of torch": ({"a": entry(2, dtype="float32")}, "has no dtype float32"),
    "a negative size": ({"a": entry(-1, -2)}, "other than whole numbers"),
    "half a row": ({"a": entry(0.5, 4)}, "other than whole numbers"),
    "true": ({"a": entry(True, 2)}, "other than whole numbers"),
    "a word": ({"a": entry("2")}, "other than whole numbers|can't multiply|not int"),
    "more than there is": ({"a": entry(3, end=12)}, "take 12 bytes, and it holds 8"),
    "less than there is": ({"a": entry(1, end=4)}, "take 4 bytes, and it holds 8"),
    "an enormous one": ({"a": entry(0, 1 << 70, end=0), "b": entry(2)}, "other than whole numbers"),
    "another size": ({"a": entry(3)}, "`a` has 8 bytes instead of 12"),
    "before the beginning": ({"a": entry(2, begin=-8, end=0)}, "other than whole numbers"),
    "an end before the beginning": ({"a": entry(2, begin=8, end=0)}, "`a` has -8 bytes"),
    "a gap": ({"a": entry(1, begin=4)}, "`a` begins at byte 4, and what is before it ends at 0"),
    "an overlap": ({"a": entry(2), "b": entry(1, begin=4)}, "`b` begins at byte 4, and what is before it ends at 8"),
    "one place for two": ({"a": entry(2), "b": entry(2)}, "`b` begins at byte 0, and what is before it ends at 8"),
    "three numbers for a place": ({"a": {**entry(2), "data_offsets": [0, 8, 8]}}, "too many values"),
    "nothing": ({}, "take 0 bytes, and it holds 8"),
}


def with_header(path: Path, text: bytes, length: int | None = None) -> Path:
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(8))
    return path


@pytest.mark.parametrize("kind", sorted(HEADERS))
def test_an_odd_header_is_refused(tmp_path: Path, kind: str) -> None:
    header, message = HEADERS[kind]
    path = with_header(tmp_path / "odd.safetensors", json.dumps(header).encode())
    with pytest.raises(CheckpointError, match=rf"odd\.safetensors` is no file of tensors \(.*({message})"):
        opened(path)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):  # the library agrees
        pass


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (b"", 0), (b"{", None), (b"\xff\xfe{}", None), (b"\0" * 100, None), (b"[" * 100_000, None), (b"null", None),
        (b"{}", 1), (b"{}", 100), (b"{}", 1 << 40), (b"{}", (1 << 64) - 1),
    ],
)  # fmt: skip
def test_garbage_is_refused(tmp_path: Path, text: bytes, length: int | None) -> None:
    with pytest.raises(CheckpointError, match="odd` is no file of tensors"):
        opened(with_header(tmp_path / "odd", text, length))


@given(st.binary(max_size=60), st.booleans())
@LESS
def test_any_bytes_are_refused_or_read(tmp_path: Path, data: bytes, measured: bool) -> None:
    path = tmp_path / "any"
    path.write_bytes(len(data).to_bytes(8, "little") + data if measured else data)
    try:
        found = opened(path).tensors()
    except CheckpointError:
        return
    assert all(tensor.read().shape == tensor.shape for tensor in found.values())


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut` is no file of tensors"):
            opened(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="take 14 bytes, and it holds 15"):
        opened(tmp_path / "cut")


# Memory


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Bytes of the storages that operations make: those of views and of files are not theirs."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given:
                self.nbytes += each.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize(
    ("box", "values"),
    [
        (Box((100, 0), (50, 1000)), 50_000),
        (Box((100, 10), (50, 20)), 1000),
        (Box((0, 3), (1000, 1)), 1000),
        (Box((5, 5), (0, 5)), 0),
        (None, 1_000_000),
    ],
)
def test_reading_a_box_takes_the_memory_of_the_box(tmp_path: Path, box: Box | None, values: int) -> None:
    stored = opened(write(tmp_path / "file", {"it": torch.zeros(1000, 1000)})).tensors()["it"]
    with Allocations() as allocations:  # type: ignore[no-untyped-call, unused-ignore]
        found = stored.read(box)
    assert found.untyped_storage().nbytes() == allocations.nbytes == 4 * values
