"""Weights in files for others: shards, an index, ties, one error on every rank, nothing half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from accel import Accelerator, CheckpointError, ConfigError, FullyShardedDataParallelPlugin
from accel.exporting import size_in_bytes
from accel_state.testing import run_ranks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens to logits."""
        logits: torch.Tensor = self.head(self.body(self.embed(tokens)))
        return logits


def seeded() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied()


def saved(folder: str, sharded: bool, limit: Any) -> None:
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin() if sharded else None)
    accelerator.save_model(accelerator.prepare(seeded()), folder, limit)


@pytest.mark.parametrize("sharded", [False, True])
def test_whole_and_in_shards(sharded: bool, tmp_path: Path) -> None:
    wanted = seeded().state_dict()
    del wanted["head.weight"]
    run_ranks(saved, 2, str(tmp_path), sharded, 70)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                     "model-00003-of-00003.safetensors"]  # fmt: skip
    found = {key: value for name in files for key, value in load_file(tmp_path / name).items()}
    assert found.keys() == wanted.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    run_ranks(saved, 2, str(tmp_path), sharded, "1KiB")  # takes the place of the shards
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == wanted.keys()


def unwritable(folder: str) -> str:
    accelerator = Accelerator()
    with pytest.raises(CheckpointError, match="could not be written") as failed:
        accelerator.save_model(accelerator.prepare(seeded()), folder)
    return str(failed.value)


def test_every_rank_learns_that_nothing_was_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert all("taken" in message for message in run_ranks(unwritable, 2, str(tmp_path / "taken")))


def test_sizes() -> None:
    assert [size_in_bytes(size) for size in (7, "5GB", "1.5 KiB", "2mb")] == [7, 5_000_000_000, 1536, 2_000_000]
    for wrong in ("5", "GB", 0, -1, True, 1.5, "0.1B"):
        with pytest.raises(ConfigError, match="is no size of a file"):
            size_in_bytes(wrong)  # type: ignore[arg-type]


def tensors_only(folder: str) -> str:
    accelerator = Accelerator()
    accelerator.save({"a": torch.arange(3)}, f"{folder}/a.safetensors", metadata={"step": "7"})
    if not accelerator.is_main_process:
        return ""
    with pytest.raises(ConfigError, match="holds tensors by name") as refused:
        accelerator.save({"b": 3}, f"{folder}/b.safetensors")  # type: ignore[dict-item]
    return str(refused.value)


def test_save_writes_tensors_and_nothing_else(tmp_path: Path) -> None:
    assert "`b` is a int" in run_ranks(tensors_only, 2, str(tmp_path))[0]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(3))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
