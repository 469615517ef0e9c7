"""Values end where they should, in the dtype that they should have, and parameters that fit stay the same objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading import ReadSettings, load_checkpoint_in_model
from accel_bigmodel.loading import checkpoint as module
from accel_bigmodel.stored import map_tensor
from accel_bigmodel.testing import load_file, save_file
from accel_state.errors import CheckpointError, ConfigError

SMALL = ReadSettings(num_threads=3, chunk_bytes=4096)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(70, 70)
        self.norm = nn.BatchNorm1d(70)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.linear(values))
        return result


def make() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), nn.Conv2d(3, 5, 2))


def empty() -> Any:
    with init_empty_weights():
        return make()


@pytest.fixture
def saved() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for each in model.buffers():
            if each.is_floating_point():
                each.normal_()
            else:
                each.fill_(3)
    return dict(model.state_dict())


@pytest.fixture
def checkpoint(tmp_path: Path, saved: dict[str, torch.Tensor]) -> Path:
    """In two shards, with an index."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names = list(saved)
    weight_map = {}
    for number, shard in enumerate([names[::2], names[1::2]]):
        file = f"model-{number}.safetensors"
        save_file({name: saved[name] for name in shard}, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def same(model: nn.Module, saved: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> bool:
    state = model.state_dict()
    return all(
        torch.equal(state[name], each.to(dtype) if dtype and each.is_floating_point() else each)
        and state[name].dtype == (dtype if dtype and each.is_floating_point() else each.dtype)
        for name, each in saved.items()
    )


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "cpu", {"0": "cpu", "1": torch.device("cpu"), "2": "cpu"}])
def test_an_empty_model_is_filled(checkpoint: Path, saved: dict[str, torch.Tensor], device_map: Any) -> None:
    model = empty()
    result = load_checkpoint_in_model(model, checkpoint, device_map, reading=SMALL)
    assert same(model, saved)
    assert all(isinstance(each, nn.Parameter) and each.requires_grad for each in model.parameters())
    assert result.bytes_by_place == {torch.device("cpu"): sum(each.nbytes for each in saved.values())}
    assert result.bytes_read == sum(each.nbytes for each in saved.values())
    assert (result.bytes_written, dict(result.stored)) == (0, {})
    model(torch.randn(2, 70)) if len(model) < 3 else model[0](torch.randn(2, 70)).sum().backward()


def test_parameters_that_fit_are_overwritten_in_place(checkpoint: Path, saved: dict[str, torch.Tensor]) -> None:
    model = make()
    model[2].weight.data = model[2].weight.data.contiguous(memory_format=torch.channels_last)
    model[0].linear.weight.note = "mine"
    before = [(each, each.data_ptr(), each.stride()) for each in [*model.parameters(), *model.buffers()]]
    load_checkpoint_in_model(model, checkpoint, reading=SMALL)
    after = [(each, each.data_ptr(), each.stride()) for each in [*model.parameters(), *model.buffers()]]
    assert all(one[0] is other[0] and one[1:] == other[1:] for one, other in zip(before, after, strict=True))
    assert same(model, saved)


@pytest.mark.parametrize("model", [make, empty], ids=["full", "empty"])
def test_a_dtype_converts_floats_on_the_way(checkpoint: Path, saved: dict[str, torch.Tensor], model: Any) -> None:
    model = model()
    model[0].linear.weight.requires_grad_(False)
    load_checkpoint_in_model(model, checkpoint, dtype="bf16", reading=SMALL)
    assert same(model, saved, torch.bfloat16)
    assert model[0].norm.num_batches_tracked.item() == 3
    assert not model[0].linear.weight.requires_grad
    assert model[1].linear.weight.requires_grad


def test_some_modules_stay_in_float32(checkpoint: Path, saved: dict[str, torch.Tensor]) -> None:
    model = empty()
    load_checkpoint_in_model(model, checkpoint, dtype=torch.float16, keep_in_fp32_modules=["norm"])
    assert {name for name, each in model.state_dict().items() if each.dtype == torch.float32} == {
        name for name, each in saved.items() if ".norm." in name and each.is_floating_point()
    }
    with pytest.raises(ConfigError, match=r"`keep_in_fp32_modules` names 'nrom'.* Did you mean 'norm'\?"):
        load_checkpoint_in_model(model, checkpoint, keep_in_fp32_modules=["nrom"])


def test_auto_takes_the_dtype_that_is_stored(tmp_path: Path) -> None:
    stored = {"weight": torch.randn(3, 3, dtype=torch.bfloat16), "bias": torch.randn(3, dtype=torch.float64)}
    save_file(stored, tmp_path / "x.safetensors")
    for dtype, expected in ((None, [torch.float32] * 2), ("auto", [torch.bfloat16, torch.float64])):
        with init_empty_weights():
            model = nn.Linear(3, 3)
        load_checkpoint_in_model(model, tmp_path / "x.safetensors", dtype=dtype)
        assert [each.dtype for each in model.parameters()] == expected
        assert torch.equal(model.weight.double(), stored["weight"].double())


@pytest.mark.parametrize("dtype", ["int8", torch.int32])
def test_a_dtype_without_fractions_is_refused(checkpoint: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no floating-point dtype.*load_and_quantize_model"):
        load_checkpoint_in_model(empty(), checkpoint, dtype=dtype)


def test_sizes_without_elements_and_without_dims_are_loaded(tmp_path: Path) -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.empty(0, 3))
    model.one = nn.Parameter(torch.tensor(0.0))
    model.register_buffer("wave", torch.zeros(3, dtype=torch.complex64))
    stored = {"empty": torch.empty(0, 3), "one": torch.tensor(5.0), "wave": torch.tensor([1j, 2, 3])}
    save_file(stored, tmp_path / "x.safetensors")
    load_checkpoint_in_model(model, tmp_path)
    assert model.one.item() == 5.0
    assert torch.equal(model.wave, stored["wave"])
    with init_empty_weights():
        other = nn.Module()
        other.empty, other.one = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(0.0))
    load_checkpoint_in_model(other, tmp_path, dtype=torch.float64, strict=False)
    assert other.one.item() == 5.0
    assert other.one.dtype == torch.float64


# Mapped in place.


@pytest.mark.parametrize("pickled", [False, True])
def test_files_become_the_memory_where_that_is_asked_for(
    checkpoint: Path, saved: dict[str, torch.Tensor], pickled: bool
) -> None:
    path = checkpoint
    if pickled:
        path = checkpoint / "x.bin"
        torch.save(saved, path)
    model = empty()
    result = load_checkpoint_in_model(model, path, mmap=True)
    assert same(model, saved)
    in_place = {name for name, _ in model.named_buffers()}
    assert result.bytes_read == sum(saved[name].nbytes for name in in_place), "more than buffers was read"
    assert result.bytes_by_place == {torch.device("cpu"): sum(each.nbytes for each in saved.values())}
    torch.optim.SGD(model.parameters(), 0.1).zero_grad()
    model[0](torch.randn(2, 70)).sum().backward()
    with torch.no_grad():
        model[0].linear.weight.zero_()
    again = empty()
    load_checkpoint_in_model(again, path)
    assert same(again, saved), "writing to the model changed the file"


@pytest.mark.parametrize(("model", "arguments"), [(empty, {"dtype": "bf16"}), (make, {})])
def test_mapping_where_nothing_can_be_is_refused(checkpoint: Path, model: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`mmap=True` gives tensors the file as their memory, and none of the 16"):
        load_checkpoint_in_model(model(), checkpoint, mmap=True, **arguments)


# What stays on disk.


def test_what_stays_on_disk_is_neither_copied_nor_written(checkpoint: Path, saved: dict[str, torch.Tensor]) -> None:
    model = empty()
    before = sorted(checkpoint.parent.rglob("*"))
    result = load_checkpoint_in_model(model, checkpoint, {"0": "disk", "1": "cpu", "2.weight": "disk", "2.bias": "cpu"})
    assert sorted(checkpoint.parent.rglob("*")) == before
    on_disk = {"0.linear.weight", "0.linear.bias", "0.norm.weight", "0.norm.bias", "2.weight"}
    assert set(result.stored) == on_disk
    assert {name for name, each in model.named_parameters() if each.is_meta} == on_disk
    assert all(torch.equal(map_tensor(each), saved[name]) for name, each in result.stored.items())
    assert all(not each.is_meta for each in model.buffers())
    assert result.places["0.linear.weight"] == "disk"
    assert result.places["0.norm.running_mean"] == torch.device("cpu")
    assert result.bytes_by_place["disk"] == sum(saved[name].nbytes for name in on_disk)
    assert result.bytes_read == sum(each.nbytes for name, each in saved.items() if name not in on_disk)


def test_buffers_stay_on_disk_where_that_is_asked_for(checkpoint: Path) -> None:
    model = empty()
    result = load_checkpoint_in_model(model, checkpoint, "disk", offload_buffers=True)
    assert all(each.is_meta for each in [*model.parameters(), *model.buffers()])
    assert "0.norm.running_mean" in result.stored


def test_values_that_go_to_disk_are_let_go_of(checkpoint: Path) -> None:
    model = make()
    load_checkpoint_in_model(model, checkpoint, {"": "disk"})
    assert all(each.is_meta for each in model.parameters())


def test_another_dtype_on_disk_is_written_once_and_found_again(
    checkpoint: Path, saved: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "offload"
    with pytest.raises(ConfigError, match=r"`offload_folder` does not say where: `0\.linear\.weight` is stored in"):
        load_checkpoint_in_model(empty(), checkpoint, {"": "disk"}, dtype="bf16")
    model = empty()
    first = load_checkpoint_in_model(model, checkpoint, {"": "disk"}, folder, "bf16", reading=SMALL)
    assert [each.suffix for each in folder.iterdir()] == [".safetensors"]
    written = load_file(next(folder.iterdir()))
    assert set(written) == set(first.stored) == {name for name, _ in model.named_parameters()}
    for name, each in first.stored.items():
        assert torch.equal(written[name], saved[name].bfloat16())
        assert torch.equal(map_tensor(each), written[name])
    assert first.bytes_written == sum(each.nbytes for each in written.values())
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    time_ns = next(folder.iterdir()).stat().st_mtime_ns
    again = load_checkpoint_in_model(empty(), checkpoint, {"": "disk"}, folder, "bf16")
    assert dict(again.stored) == dict(first.stored)
    assert again.bytes_written == 0
    assert next(folder.iterdir()).stat().st_mtime_ns == time_ns
    load_checkpoint_in_model(empty(), checkpoint, {"": "disk"}, folder, "fp16")
    assert len(list(folder.iterdir())) == 2, "another dtype took the name of the first"


def test_a_full_disk_is_told_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "offload"
    monkeypatch.setattr(os, "posix_fallocate", full)
    model = empty()
    with pytest.raises(CheckpointError, match=r"has no room for them \(No space left on device; .* are free\)\. Free"):
        load_checkpoint_in_model(model, checkpoint, {"": "disk"}, folder, "bf16")
    assert list(folder.iterdir()) == []
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_a_disk_that_is_known_to_be_too_small_is_not_written_to(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"10 B are free"):
        load_checkpoint_in_model(empty(), checkpoint, {"": "disk"}, tmp_path / "offload", "bf16")
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_load_that_fails_in_the_middle_leaves_no_file_and_no_values(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = checkpoint / "model-1.safetensors"
    model = empty()
    original = module.plan_load

    def cut_behind_the_header(*args: Any) -> Any:
        planned = original(*args)
        shard.write_bytes(shard.read_bytes()[:-2000])
        return planned

    monkeypatch.setattr(module, "plan_load", cut_behind_the_header)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors` ends within"):
        load_checkpoint_in_model(model, checkpoint, {"0": "cpu", "1": "disk", "2": "disk"}, tmp_path / "new", "bf16")
    assert list((tmp_path / "new").iterdir()) == []
    assert all(each.is_meta and each.dtype == torch.float32 for each in model.parameters())


# Maps and arguments that cannot work.


def test_the_longest_name_counts(checkpoint: Path) -> None:
    result = load_checkpoint_in_model(empty(), checkpoint, {"": "disk", "0": "cpu", "0.linear": "disk"})
    assert result.places["0.linear.weight"] == "disk"
    assert result.places["0.norm.weight"] == torch.device("cpu")
    assert result.places["1.norm.weight"] == "disk"


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"": "cpu", "blokc": "cpu"}, r"`device_map` names 'blokc', but the Sequential has no module"),
        ({"0": "cpu"}, r"says nothing of 9 of the model's tensors, `1\.linear\.weight` the first\. Add .* `1\.linear`"),
        ({"": "gpu0"}, r"puts '' on 'gpu0', which is no device"),
        ({"": "meta"}, r"'meta'` is not a device type known here"),
        ({"": "xpu:9999"}, r"puts '' on 'xpu:9999', but this process sees \d+ accelerators"),
        ("auto", r"`device_map='auto'` asks for a map to be made.*load_checkpoint_and_dispatch"),
    ],
)
def test_a_map_that_cannot_be_followed_is_refused(checkpoint: Path, device_map: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_checkpoint_in_model(empty(), checkpoint, device_map)


@pytest.mark.skipif(torch.cuda.is_available(), reason="numbers name accelerators, and here are some")
def test_a_number_without_an_accelerator_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"puts '' on 0, but this process sees 0 accelerators"):
        load_checkpoint_in_model(empty(), checkpoint, {"": 0})


@pytest.mark.parametrize(
    ("arguments", "successor"),
    [
        ({"offload_state_dict": True}, "Leave it out"),
        ({"offload_8bit_bnb": True}, "load_and_quantize_model"),
        ({"full_state_dict": False}, r"Accelerator\.load_state"),
    ],
)
def test_settings_of_others_that_mean_nothing_here_name_what_does(
    checkpoint: Path, arguments: dict[str, Any], successor: str
) -> None:
    with pytest.raises(ConfigError, match=successor):
        load_checkpoint_in_model(empty(), checkpoint, **arguments)


def test_the_bar_is_shown_when_asked_for(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_checkpoint_in_model(empty(), checkpoint)
    assert capsys.readouterr().err == ""
    load_checkpoint_in_model(empty(), checkpoint, progress=True)
    assert "100%" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_model_is_filled_on_a_gpu_by_one_allocation(
    checkpoint: Path, saved: dict[str, torch.Tensor], dtype: str | None
) -> None:
    model = empty()
    load_checkpoint_in_model(model, checkpoint, {"": 0}, dtype=dtype)
    assert {each.device.type for each in model.parameters()} == {"cuda"}
    assert same(model.cpu(), saved, None if dtype is None else torch.bfloat16)
