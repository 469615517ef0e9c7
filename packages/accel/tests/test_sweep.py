"""Exactly once: for every length, batch size and world, whatever the data, the gathered ids are all there are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from accel import Accelerator, DataLoaderConfiguration
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

CPU = ProcessSettings(device="cpu")


class Rows(Dataset[dict[str, Any]]):
    """Ragged and nested."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "ragged": torch.zeros(index % 4)}


def keep_ragged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": torch.tensor([row["id"] for row in rows]), "ragged": [row["ragged"] for row in rows]}


class Shuffled(Sampler[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(self.length), self.length))


class Stream(IterableDataset[dict[str, Any]]):
    """Six shards or none, of different lengths."""

    def __init__(self, ids: list[int], num_shards: int) -> None:
        self.ids = ids
        self.num_shards = num_shards

    def shard(self, num_shards: int, index: int) -> Stream:
        return Stream(self.ids[index::num_shards], self.num_shards // num_shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"id": each, "ragged": torch.zeros(each % 4)} for each in self.ids)


def loader_of(kind: str, length: int, batch_size: int) -> DataLoader[Any] | None:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    common: dict[str, Any] = {"batch_size": batch_size, "collate_fn": keep_ragged}
    if kind == "sampler":
        return DataLoader(Rows(length), sampler=Shuffled(length), **common)
    if kind == "batch sampler":
        batches = [list(range(start, min(length, start + batch_size))) for start in range(0, length, batch_size)]
        return DataLoader(Rows(length), batch_sampler=batches, collate_fn=keep_ragged)
    if kind == "pre-sharded":
        if length < world:
            return None
        sampler: Any = DistributedSampler(Rows(length), world, rank, shuffle=False, drop_last=True)
        return DataLoader(Rows(length), sampler=sampler, **common)
    if kind in ("stream", "divided stream", "dispatched stream"):
        num_shards = 6 if kind == "divided stream" and length >= 6 else 1
        return DataLoader(Stream(list(range(length)), num_shards), **common)
    return DataLoader(Rows(length), shuffle=kind != "map", **common)


def config_of(kind: str) -> dict[str, Any]:
    if kind == "pre-sharded":
        return {"sharding": "given"}
    return {"dispatch_batches": kind.startswith("dispatched")}


def sweep(kind: str, lengths: list[int], batch_sizes: list[int]) -> int:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(data_seed=1, **config_of(kind)))
    checked = 0
    for length in lengths:
        for batch_size in batch_sizes:
            user = loader_of(kind, length, batch_size)
            if user is None:
                continue
            loader = accelerator.prepare(user)
            for _ in range(1 + (batch_size == 1)):
                seen = [each for batch in loader for each in accelerator.gather_for_metrics(batch["id"]).tolist()]
                whole = length - length % accelerator.num_processes if kind == "pre-sharded" else length
                assert sorted(seen) == list(range(whole)), (length, batch_size)
                checked += 1
        if length % 10 == 0:
            accelerator.free_memory()
    return checked


KINDS = [
    "map",
    "shuffled",
    "sampler",
    "batch sampler",
    "stream",
    "divided stream",
    "dispatched",
    "dispatched stream",
    "pre-sharded",
]


@pytest.mark.parametrize("kind", ["map", "divided stream", "dispatched", "pre-sharded"])
def test_some_of_all(kind: str) -> None:
    checked = run_ranks(sweep, 2, kind, [1, 2, 7, 24, 50], [1, 4], settings=CPU)
    assert checked[0] >= 12


@pytest.mark.matrix
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_length_batch_size_and_world(kind: str, world: int) -> None:
    checked = run_ranks(sweep, world, kind, list(range(1, 51)), list(range(1, 6)), settings=CPU, timeout_s=110.0)
    assert checked[0] >= 280
