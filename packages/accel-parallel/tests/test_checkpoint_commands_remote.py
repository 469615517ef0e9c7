"""The commands on checkpoints of an object store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from accel_parallel.checkpoint import About, Item, write_checkpoint
from accel_parallel.checkpoint_commands import main
from accel_state.errors import CheckpointError

RUN = "memory://bucket/run"


@pytest.fixture(autouse=True)
def _store() -> Iterator[None]:
    MemoryFileSystem.store.clear()
    for number in range(4):
        write(number)
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, capsys.readouterr().out

    return run


def write(number: int) -> None:
    items = [Item("model", "model", {"weight": torch.full((8,), float(number))})]
    write_checkpoint(f"{RUN}/checkpoints/checkpoint_{number}", items, about=About(step=number, strategy="single"))


@pytest.mark.parametrize("folder", [RUN, f"{RUN}/checkpoints", f"{RUN}/"])
def test_ls(folder: str, say: Callable[..., tuple[int, str]]) -> None:
    found = json.loads(say("ls", folder, "--json")[1])
    assert [(each["name"], each["step"], each["is_latest"], each["written"]) for each in found] == [
        (f"checkpoint_{number}", number, number == 3, None) for number in range(4)
    ]
    assert [line.split()[-1] for line in say("ls", folder)[1].splitlines()[1:]] == ["complete"] * 4


def test_show_verify_diff_and_consolidate(say: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, out = say("show", RUN, "--tensors")
    assert code == 0
    assert "checkpoint_3" in out.splitlines()[0]
    assert "weight" in out
    assert say("verify", RUN, f"{RUN}/checkpoints/checkpoint_0")[0] == 0
    code, out = say("diff", RUN, f"{RUN}/checkpoints/checkpoint_1")
    assert code == 1
    assert "weight: 8 of 8 values, by at most 2" in out
    assert say("consolidate", RUN, tmp_path / "out")[0] == 0
    name = next(name for name in MemoryFileSystem.store if "checkpoint_3" in name and name.endswith(".safetensors"))
    MemoryFileSystem.store[name].getbuffer()[-1] ^= 1
    assert say("verify", RUN)[0] == 1


def test_prune_keeps_what_was_asked_for(say: Callable[..., tuple[int, str]]) -> None:
    assert "3 checkpoints of" in say("prune", RUN, "--keep", 1, "--dry-run")[1]
    say("prune", RUN, "--keep", 1, "--every", 2, "--yes")
    assert [each["number"] for each in json.loads(say("ls", RUN, "--json")[1])] == [0, 2, 3]


def test_nothing_is_there(say: Callable[..., tuple[int, str]]) -> None:
    assert say("ls", "memory://elsewhere") == (0, "No checkpoints under memory://elsewhere.\n")
    with pytest.raises(CheckpointError, match=r"`memory://elsewhere` holds no `manifest.json`.*give one of those"):
        say("show", "memory://elsewhere")


def test_convert_writes_there(say: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert say("convert", tmp_path, "memory://bucket/new")[0] == 0
    assert say("verify", "memory://bucket/new")[0] == 0
