"""What is in a checkpoint, what is said of damage, and which one is the latest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_parallel.checkpoint import (
    Checkpoint,
    Item,
    Manifest,
    latest_checkpoint,
    next_number,
    numbered_path,
    prune,
    save_checkpoint,
)
from accel_parallel.checkpoint.folder import LocalFolder
from accel_parallel.checkpoint.layout import complete_checkpoints, previous_path, recover
from accel_state import CheckpointError, ConfigError, Process, ProcessSettings


@pytest.fixture(autouse=True)
def process() -> Iterator[Process]:
    with Process.open(ProcessSettings(device="cpu")) as opened:
        yield opened


def items(step: int = 0) -> list[Item]:
    return [
        Item("model", "model", {"weight": torch.full((4,), float(step)), "bias": torch.zeros(2)}),
        Item(
            "optimizer", "optimizer", {"state": {"weight": {"m": torch.tensor(float(step))}}, "groups": [{"lr": 0.1}]}
        ),
        Item("progress", "progress", {"step": step}),
    ]


def save(folder: Path, step: int = 0, content: list[Item] | None = None) -> Path:
    return save_checkpoint(folder, content or items(step), process=Process.current(), step=step, strategy="single")


def saved_step(folder: Path) -> int:
    """Reads everything, and checks that it belongs together."""
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.items) == {"model", "optimizer", "progress"}
    step = int(checkpoint.read("progress")["step"])
    assert checkpoint.manifest.step == step
    assert checkpoint.read("model")["weight"].tolist() == [step] * 4
    assert checkpoint.read("optimizer")["state"]["weight"]["m"].item() == step
    return step


# What is in it


def test_a_checkpoint_holds_what_was_saved(tmp_path: Path) -> None:
    folder = save(tmp_path / "deep" / "run", 7)
    assert saved_step(folder) == 7
    manifest = Checkpoint(folder).manifest
    assert (manifest.world_size, manifest.strategy, manifest.items["model"].kind) == (1, "single", "model")
    assert manifest.libraries["torch"] == torch.__version__ or "torch" in manifest.libraries
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.json",
        "optimizer.safetensors",
        "progress.json",
    ]
    assert os.listdir(folder.parent) == ["run"]


def test_nothing_is_an_item_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", content=[Item("none", "custom", None), Item("empty", "model", {})])
    assert Checkpoint(folder).read("none") is None
    assert Checkpoint(folder).read("empty") == {}
    assert Checkpoint(save(tmp_path / "void", content=[])).items.keys() >= set()


ODD = {
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "empty_too": torch.empty(0, 4),
    "bool": torch.tensor([True, False]),
    "bf16": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "fp8": torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "strided": torch.arange(8)[::2],
    "part": torch.arange(100)[:3],
    "expanded": torch.ones(1).expand(5),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "negative": torch.tensor([1 + 2j]).conj().imag,
    "requires_grad": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("nested", [False, True])
def test_odd_tensors_come_back(tmp_path: Path, nested: bool) -> None:
    content = {"inner": ODD} if nested else ODD
    folder = save(tmp_path / "run", content=[Item("odd", "custom", content)])
    back = Checkpoint(folder).read("odd")
    back = back["inner"] if nested else back
    assert back.keys() == ODD.keys()
    for name, tensor in ODD.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(
            back[name].float() if "fp8" in name else back[name], tensor.float() if "fp8" in name else tensor
        )
    assert (folder / "odd.safetensors").stat().st_size < 4000  # `part` does not take the whole with it


@pytest.mark.parametrize("nested", [False, True])
def test_tied_tensors_are_saved_once_and_come_back_tied(tmp_path: Path, nested: bool) -> None:
    weight = torch.randn(1000)
    tied = {"embed": weight, "head": weight.view(1000), "half": weight[:500]}
    folder = save(tmp_path / "run", content=[Item("model", "model", {"in": tied} if nested else tied)])
    back = Checkpoint(folder).read("model")
    back = back["in"] if nested else back
    assert back["embed"] is back["head"]
    assert torch.equal(back["half"], weight[:500])
    assert (folder / "model.safetensors").stat().st_size < 1.5 * 4000 + 500


def test_keys_that_a_tensor_file_cannot_hold_go_beside_it(tmp_path: Path) -> None:
    for number, state in enumerate([{0: torch.ones(1)}, {"__metadata__": torch.ones(1)}]):
        folder = save(tmp_path / f"run{number}", content=[Item("custom", "custom", state)])
        assert Checkpoint(folder).read("custom") == state


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(2, device="meta"), "`w` of `it` is on the meta device"),
        (torch.eye(2).to_sparse(), "`w` of `it` has the layout torch.sparse_coo"),
        (torch.zeros(1, dtype=torch.complex128), "`w` of `it` is torch.complex128"),
    ],
)
def test_tensors_without_plain_values_are_refused(tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"rank 0: CheckpointError: The tensor {message}"):
        save(tmp_path / "run", content=[Item("it", "custom", {"w": tensor})])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "manifest", "a b", "\0"])
def test_names_that_are_no_files_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the stem of its files"):
        Item(name, "custom", {})


def test_two_items_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Two items are called `model`"):
        save(tmp_path / "run", content=[*items(), items()[0]])
    assert os.listdir(tmp_path) == []


def test_unknown_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank 0: CheckpointError: `custom\.fn` is a .*never pickled"):
        save(tmp_path / "run", content=[Item("custom", "custom", {"fn": print})])


def test_an_item_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no `scaler`; it holds model, optimizer, progress"):
        Checkpoint(save(tmp_path / "run")).read("scaler")


# Damage

FILES = ["model.safetensors", "optimizer.json", "optimizer.safetensors", "progress.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["deleted", "cut", "flipped", "replaced by a link", "replaced by a folder"])
def test_damage_names_the_file_and_the_item(tmp_path: Path, name: str, damage: str) -> None:
    folder = save(tmp_path / "run")
    path = folder / name
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()
    if damage == "replaced by a link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "replaced by a folder":
        path.mkdir()
    problem = {
        "deleted": "is missing",
        "cut": f"has {len(data) - 1} bytes instead of {len(data)}",
        "flipped": "checksum differs",
    }.get(damage, "cannot be read as a plain file")
    item = name.split(".")[0]
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"`{name}` of `{item}` in .* {problem}"):
        checkpoint.read(item)
    for other in set(checkpoint.items) - {item}:
        checkpoint.read(other)


def test_any_flipped_byte_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 3) / "manifest.json"
    data = path.read_bytes()
    meaning = json.loads(data)
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        path.write_bytes(changed)
        try:
            Manifest.read(LocalFolder(path.parent))
        except CheckpointError as error:
            assert "manifest" in str(error)  # noqa: PT017
        else:
            assert json.loads(changed) == meaning  # white space only


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"format": "other"}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = save(tmp_path / "run")
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest\.json` is (damaged|not a checkpoint's manifest)"):
        Checkpoint(folder)


def test_folders_without_a_manifest_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=r"holds no `manifest\.json`, so it is no complete checkpoint"):
            Checkpoint(folder)


def sealed(folder: Path, change: Any) -> None:
    """Changes a manifest as another writer would, checksum included."""
    import xxhash

    data = json.loads((folder / "manifest.json").read_text())
    del data["xxh3_128"]
    change(data)
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["xxh3_128"] = xxhash.xxh3_128_hexdigest(text.encode())
    (folder / "manifest.json").write_text(json.dumps(data))


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    sealed(folder, lambda data: data.update(version=3))
    with pytest.raises(CheckpointError, match="has format version 3, and this accel-parallel reads 2"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", "..", ""])
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "run")
    sealed(folder, lambda data: data["files"].update({name: data["files"]["model.safetensors"]}))
    with pytest.raises(CheckpointError, match="which lies outside the checkpoint's folder"):
        Checkpoint(folder)


def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    sealed(folder, lambda data: data["files"].pop("model.safetensors"))
    with pytest.raises(CheckpointError, match=r"gives `model` the file `model\.safetensors` and does not list it"):
        Checkpoint(folder)
    folder = save(tmp_path / "other")
    sealed(folder, lambda data: data.pop("items"))
    with pytest.raises(CheckpointError, match="is missing or odd"):
        Checkpoint(folder)


# Names, numbers, retention


def test_numbers_go_up_and_the_latest_is_the_highest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    assert next_number(tmp_path / "nowhere") == next_number(tmp_path) == 0
    for number in (0, 9, 10):
        save(numbered_path(tmp_path, number), number)
    (tmp_path / "checkpoint_best").mkdir()
    (tmp_path / "checkpoint_12").mkdir()  # incomplete: not the latest, but its number is taken
    (tmp_path / ".checkpoint_40.tmp-x-1-00000000").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint_10"
    assert next_number(tmp_path) == 13
    assert [number for number, _ in complete_checkpoints(tmp_path)] == [0, 9, 10]
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_broken_checkpoints_alone_are_not_taken_for_a_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_best").mkdir()
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint_3").mkdir()
    with pytest.raises(CheckpointError, match="holds checkpoint_3, and none of them has a"):
        latest_checkpoint(tmp_path)


def test_old_checkpoints_go_and_kept_ones_stay(tmp_path: Path) -> None:
    for number in range(5):
        save(numbered_path(tmp_path, number), number)
    removed = prune(tmp_path, total_limit=2, keep=[tmp_path / "checkpoint_1"])
    assert [path.name for path in removed] == ["checkpoint_0", "checkpoint_2"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1", "checkpoint_3", "checkpoint_4"]
    assert prune(tmp_path, total_limit=9) == []
    with pytest.raises(ConfigError, match="`total_limit=0` would remove the checkpoint"):
        prune(tmp_path, total_limit=0)


def test_a_checkpoint_aside_is_put_back(tmp_path: Path) -> None:
    final = save(tmp_path / "checkpoint_3", 3)
    final.rename(previous_path(final))
    assert next_number(tmp_path) == 4
    assert latest_checkpoint(tmp_path) == final
    assert saved_step(final) == 3
    final.rename(previous_path(final))
    final.mkdir()  # as a script does that makes its output folder when it starts
    recover(final)
    assert saved_step(final) == 3


def test_a_checkpoint_aside_goes_when_the_new_one_is_there(tmp_path: Path) -> None:
    final = save(tmp_path / "run", 3)
    final.rename(previous_path(final))
    save(tmp_path / "other", 4).rename(final)
    recover(final)
    assert saved_step(final) == 4
    assert os.listdir(tmp_path) == ["run"]


def test_a_checkpoint_aside_is_left_alone_when_something_else_is_there(tmp_path: Path) -> None:
    final = save(tmp_path / "run", 3)
    final.rename(previous_path(final))
    final.mkdir()
    (final / "notes.txt").touch()
    recover(final)
    assert saved_step(previous_path(final)) == 3
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        save(final, 4)
    assert saved_step(previous_path(final)) == 3
