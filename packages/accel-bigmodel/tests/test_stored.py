"""Where the tensors of safetensors files are found, and what is said of files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_bigmodel.stored import StoredTensor, map_tensor, read_bytes, read_file_header, read_index, read_into
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor([True, False, True]),
    "c": torch.randn(5, 2, dtype=torch.bfloat16),
    "empty": torch.empty(0, 7, dtype=torch.float16),
    "one": torch.tensor(7, dtype=torch.int64),
}


def write(path: Path) -> Path:
    save_file(TENSORS, path)
    return path


def read(stored: StoredTensor) -> torch.Tensor:
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    read_into(stored, raw)
    return raw.view(stored.dtype).view(stored.shape)


def test_every_tensor_is_found_with_its_values(tmp_path: Path) -> None:
    found = read_file_header(write(tmp_path / "x.safetensors"))
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        for values in (read(found[name]), map_tensor(found[name])):
            assert values.dtype == expected.dtype
            assert torch.equal(values, expected), name


def test_a_part_is_read_from_its_first_byte_on(tmp_path: Path) -> None:
    stored = read_file_header(write(tmp_path / "x.safetensors"))["a.weight"]
    raw = torch.empty(8, dtype=torch.uint8)
    with stored.path.open("rb") as stream:
        read_bytes(stream.fileno(), stored, raw, begin=16)
    assert raw.view(torch.float32).tolist() == [4.0, 5.0]


def test_a_mapped_tensor_may_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    stored = read_file_header(write(tmp_path / "x.safetensors"))["a.weight"]
    map_tensor(stored).zero_()
    assert torch.equal(read(stored), TENSORS["a.weight"])


def test_a_tensor_at_an_odd_place_is_read_all_the_same(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    body = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    stored = read_file_header(path)["x"]
    assert map_tensor(stored).tolist() == read(stored).tolist() == [1.5, -2.0]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_file_that_was_cut_or_grew_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "x.safetensors")
    whole = path.read_bytes()
    length = data.draw(st.integers(0, len(whole) + 3).filter(lambda size: size != len(whole)))
    path.write_bytes((whole + b"\0\0\0")[:length])
    with pytest.raises(CheckpointError, match=r"x\.safetensors` is no whole safetensors file: .*Copy or download"):
        read_file_header(path)


def test_a_file_cut_after_its_header_was_read_names_the_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    stored = read_file_header(path)["a.weight"]
    path.write_bytes(path.read_bytes()[: stored.offset + 4])
    with pytest.raises(CheckpointError, match=r"ends within `a\.weight`: it was cut short since"):
        read(stored)


def sharded(folder: Path, **more: str) -> Path:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.ones(4)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", **more}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_an_index_its_folder_and_a_folder_without_one_are_read_alike(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    expected = read_index(index)
    assert sorted(expected) == ["a", "b", "c"]
    assert read_index(tmp_path) == expected
    index.rename(tmp_path / "other.safetensors.index.json")
    assert read_index(tmp_path) == expected
    (tmp_path / "other.safetensors.index.json").unlink()
    assert read_index(tmp_path) == expected


def test_a_missing_shard_is_named_with_what_it_holds(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"places 2 tensors, `a` the first, in `one\.safetensors`, but there is"):
        read_index(index)


def test_an_index_that_names_what_no_shard_holds_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path, bb="one.safetensors")
    with pytest.raises(CheckpointError, match=r"places `bb` in `one\.safetensors`, but .* Did you mean 'b'\?"):
        read_index(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}', "[" * 100_000])
def test_what_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match="is no index of shards"):
        read_index(index)


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path, evil="../secret.safetensors")
    with pytest.raises(CheckpointError, match=r"names the shard '\.\./secret\.safetensors', which is not a file"):
        read_index(index)


def test_names_in_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="`a` is both in"):
        read_index(tmp_path)


def test_a_folder_without_weights_and_a_path_without_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        read_index(tmp_path)
    with pytest.raises(CheckpointError, match="There is no file or folder"):
        read_index(tmp_path / "nothing")
