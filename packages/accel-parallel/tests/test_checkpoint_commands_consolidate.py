"""What `accel checkpoint consolidate` writes, how much memory that takes, and what it never destroys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from accel_parallel.checkpoint import About, Item, write_checkpoint
from accel_parallel.checkpoint.folder import LocalFolder
from accel_parallel.checkpoint_commands import consolidate, main
from accel_state.errors import CheckpointError, ConfigError

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["consolidate", *(str(word) for word in words)])
        return code, capsys.readouterr().out

    return run


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    embedding = torch.randn(20, 8)
    return {
        "embed.weight": embedding,
        "norm.weight": torch.randn(8, dtype=torch.float64),
        "head.weight": embedding,
        "counts": torch.arange(5),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    items = [Item("model", "model", weights()), Item("scheduler", "scheduler", {"last_epoch": 3})]
    return write_checkpoint(tmp_path / "checkpoint_0", items, about=About(step=1, strategy="single"), sync=False)


def held(output: Path) -> dict[str, torch.Tensor]:
    """All tensors of an output, found as readers of such folders find them."""
    index = output / "model.safetensors.index.json"
    if not index.exists():
        return load_file(output / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    found = {}
    for name in set(where.values()):
        found.update(load_file(output / name))
    assert found.keys() == where.keys()
    return found


def test_one_file_with_every_tensor_once(folder: Path, say: Say, tmp_path: Path) -> None:
    output = tmp_path / "new" / "exported"
    code, out = say(folder, output)
    assert code == 0
    assert "head.weight is embed.weight, and is not written twice" in out
    assert [path.name for path in output.iterdir()] == ["model.safetensors"]
    assert [path.name for path in output.parent.iterdir()] == ["exported"]
    found, expected = held(output), weights()
    assert found.keys() == expected.keys() - {"head.weight"}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dtype_changes_floating_point_alone(folder: Path, say: Say, tmp_path: Path) -> None:
    say(folder, tmp_path / "out", "--dtype", "bfloat16")
    found, expected = held(tmp_path / "out"), weights()
    assert torch.equal(found["embed.weight"], expected["embed.weight"].bfloat16())
    assert torch.equal(found["norm.weight"], expected["norm.weight"].bfloat16())
    assert torch.equal(found["counts"], expected["counts"])


def test_shards_are_as_large_as_asked(folder: Path, say: Say, tmp_path: Path) -> None:
    output = tmp_path / "out"
    say(folder, output, "--max-shard-size", "120B")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 20 * 8 * 4 + 8 * 8 + 5 * 8}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert index["weight_map"]["counts"] == index["weight_map"]["norm.weight"]
    for name, tensor in held(output).items():
        assert torch.equal(tensor, weights()[name])


def test_what_is_there_is_replaced_when_that_is_said(folder: Path, say: Say, tmp_path: Path) -> None:
    output = tmp_path / "out"
    say(folder, output, "--max-shard-size", "120B")
    (output / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"`.*/out` holds model-00001-of-00002.* already.*or give `--force`"):
        say(folder, output)
    assert say(folder, output, "--force")[0] == 0
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was_there(there: bool, folder: Path, say: Say, tmp_path: Path, monkeypatch: Any) -> None:
    output = tmp_path / "out"
    if there:
        say(folder, output)
        before = (output / "model.safetensors").read_bytes()
    real, calls = LocalFolder.write, []

    def fail(self: LocalFolder, name: str, *args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, name, *args, **options)

    monkeypatch.setattr(LocalFolder, "write", fail)
    with pytest.raises(CheckpointError, match=r"could not go on \(.*No space"):
        say(folder, output, "--max-shard-size", "120B", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint_0", *(["out"] if there else [])])
    if there:
        assert [path.name for path in output.iterdir()] == ["model.safetensors"]
        assert (output / "model.safetensors").read_bytes() == before


def test_a_damaged_file_is_not_exported(folder: Path, say: Say, tmp_path: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"`model.safetensors` of `model` .* has changed"):
        say(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused(folder: Path, say: Say, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`scheduler` .* is no plain set of tensors.*Give `--item`.*: model\."):
        say(folder, tmp_path / "out", "--item", "scheduler")
    with pytest.raises(ConfigError, match=r"`s3://bucket/out` is a URL, and weights are written to this machine"):
        say(folder, "s3://bucket/out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"`.*/file` is a file, and weights go into a folder"):
        say(folder, tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of its own is asked of Linux")
def test_memory_is_that_of_one_tensor(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    size = 4 << 20
    model = {f"layer{number}.weight": torch.full((size // 4,), float(number)) for number in range(24)}
    about = About(step=1, strategy="single")
    folder = write_checkpoint(tmp_path / "checkpoint_0", [Item("model", "model", model)], about=about, sync=False)
    del model
    peaks: list[int] = []

    @contextmanager
    def bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
        begin = anonymous_bytes()
        yield lambda count: peaks.append(anonymous_bytes() - begin)

    monkeypatch.setattr(consolidate, "bytes_bar", bar)
    say(folder, tmp_path / "out", "--dtype", "float64")
    # Half of it is what the allocator keeps of a few tensors that are gone; all of them would be 48 sizes.
    assert len(peaks) > 24
    assert max(peaks) < 16 * size
    assert len(held(tmp_path / "out")) == 24


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10
