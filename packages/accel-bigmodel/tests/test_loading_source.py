"""Checkpoints in all their forms, and what is said of those that cannot be read or must not be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading import ReadSettings, load_checkpoint_in_model
from accel_bigmodel.loading.source import open_checkpoint
from accel_bigmodel.stored import map_tensor
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError, ConfigError


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"0.weight": torch.randn(9, 5), "0.bias": torch.randn(9), "1.weight": torch.randn(4, 9).t().contiguous().t()}


def empty() -> Any:
    with init_empty_weights():
        return nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 4, bias=False))


def one(folder: Path, name: str) -> Path:
    torch.save(tensors(), folder / name)
    return folder / name


def shards(folder: Path, name: str) -> Path:
    weight_map = {}
    for number, (key, value) in enumerate(tensors().items()):
        file = f"part-{number}.bin"
        torch.save({key: value}, folder / file)
        weight_map[key] = file
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


@pytest.mark.parametrize(
    ("write", "name", "folder"),
    [
        (one, "pytorch_model.bin", False),
        (one, "pytorch_model.bin", True),
        (one, "any.pt", True),
        (one, "any.pth", False),
        (shards, "pytorch_model.bin.index.json", False),
        (shards, "pytorch_model.bin.index.json", True),
        (shards, "other.bin.index.json", True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickled_checkpoints_are_loaded(
    tmp_path: Path, write: Callable[[Path, str], Path], name: str, folder: bool, dtype: torch.dtype
) -> None:
    path = write(tmp_path, name)
    model = empty()
    load_checkpoint_in_model(
        model, tmp_path if folder else path, dtype=dtype, reading=ReadSettings(chunk_bytes=4096)
    )  # fmt: skip
    assert all(torch.equal(each, tensors()[name].to(dtype)) for name, each in model.state_dict().items())


def test_pickled_tensors_that_stay_on_disk_are_written_as_safetensors(tmp_path: Path) -> None:
    path = one(tmp_path, "x.bin")
    with pytest.raises(ConfigError, match=r"`0\.weight` lies in `x\.bin` in a form that cannot be read in place"):
        load_checkpoint_in_model(empty(), path, {"": "disk"})
    result = load_checkpoint_in_model(empty(), path, {"": "disk"}, tmp_path / "offload")
    assert all(torch.equal(map_tensor(each), tensors()[name]) for name, each in result.stored.items())
    assert len(result.stored) == 3


def test_safetensors_are_taken_where_both_kinds_are(tmp_path: Path) -> None:
    one(tmp_path, "pytorch_model.bin")
    save_file({name: torch.zeros(each.shape) for name, each in tensors().items()}, tmp_path / "model.safetensors")
    model = empty()
    load_checkpoint_in_model(model, tmp_path)
    assert not any(each.any() for each in model.parameters())


def test_a_pickle_that_would_run_something_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"0.weight": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(CheckpointError, match=r"holds `\w+\.mkdir` and not only tensors, and a pickle is never run"):
        load_checkpoint_in_model(empty(), tmp_path / "evil.bin")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": tensors(), "epoch": 3}, r"holds tensors under 'state_dict' and not at its top.*Save the part"),
        ({**tensors(), "epoch": 3}, r"holds 'epoch', a int, among its tensors"),
        ([torch.ones(1)], r"holds a list and not tensors by name"),
        ({"x": torch.ones(2, 2).to_sparse()}, r"holds 'x' as a tensor of layout torch\.sparse_coo"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path / "x.pt")


def test_a_pickle_that_cannot_be_mapped_is_refused_with_the_reason(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"cannot be mapped into memory \(torch before 1\.6 wrote it, or none\)"):
        open_checkpoint(tmp_path / "old.bin")
    path = one(tmp_path, "cut.bin")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be mapped into memory \(it ends early: no archive ends"):
        open_checkpoint(path)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match=r"x\.bin` cannot be read as tensors \(.*Copy or download it again"):
        open_checkpoint(tmp_path / "x.bin")


def test_an_index_of_pickles_that_names_what_no_shard_holds_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, "x.bin.index.json")
    text = json.loads(index.read_text())
    text["weight_map"]["0.biass"] = text["weight_map"]["0.bias"]
    index.write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"places `0\.biass` in `part-1\.bin`, but .* Did you mean '0\.bias'\?"):
        open_checkpoint(index)


def test_a_path_without_a_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    one(tmp_path, "model.bin")
    with pytest.raises(CheckpointError, match=r"no file or folder `.*modle\.bin`\. Did you mean 'model\.bin'\?"):
        open_checkpoint(tmp_path / "modle.bin")


def test_a_folder_with_nothing_or_with_a_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no file with weights, so what to load is not known"):
        open_checkpoint(tmp_path)
    one(tmp_path, "a.bin")
    one(tmp_path, "b.pt")
    with pytest.raises(CheckpointError, match=r"holds several \(a\.bin, b\.pt\)"):
        open_checkpoint(tmp_path)
