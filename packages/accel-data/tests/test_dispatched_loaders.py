"""Loaders that rank 0 reads for all: what every rank gets is what it would have read itself."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader
from accel_data.dispatch import DispatchError
from accel_state.testing import run_ranks
from accel_state.topology import MeshShape, Topology


class Guarded(Dataset[dict[str, Any]]):
    """Ragged and nested samples; says on which rank it is read."""

    def __init__(self, length: int, *, breaks_at: int | None = None) -> None:
        self.length = length
        self.breaks_at = breaks_at
        self.read = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        if index == self.breaks_at:
            raise OSError("storage went away")
        return {"id": index, "ragged": torch.arange(index % 3), "text": f"row {index}"}


class Stream(IterableDataset[Any]):
    def __init__(self, length: int) -> None:
        self.data = Guarded(length)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.data[index] for index in range(self.data.length))


def keep(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ids": torch.tensor([row["id"] for row in rows]),
        "ragged": [row["ragged"] for row in rows],
        "text": [row["text"] for row in rows],
    }


def make(kind: str, length: int, workers: int) -> DataLoader[Any]:
    common: dict[str, Any] = {"collate_fn": keep, "num_workers": workers}
    if workers:
        common["multiprocessing_context"] = "fork"
    if kind == "stream":
        return DataLoader(Stream(length), batch_size=2, **common)
    if kind == "batch_sampler":
        return DataLoader(Guarded(length), batch_sampler=[[row] * (row % 3 + 1) for row in range(length)], **common)
    return DataLoader(
        Guarded(length), batch_size=2, shuffle=kind == "shuffled", drop_last=kind == "drop_last", **common
    )


def prepared(
    user: DataLoader[Any], *, dispatch: bool, topology: Topology | None = None, **config: Any
) -> ShardedLoader:
    if topology is None:
        topology = Topology(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
    settings = DataLoaderConfiguration(dispatch_batches=dispatch, data_seed=9, **config)
    return prepare_data_loader(user, topology=topology, config=settings, name="train loader")


def contents(loader: ShardedLoader) -> list[Any]:
    found = []
    for batch in loader:
        plain = {"ids": batch["ids"].tolist(), "ragged": [each.tolist() for each in batch["ragged"]]}
        found.append((plain, batch["text"], tuple(loader.batch_info or ())))
    return found


def compare(kinds: list[str], workers: int) -> int:
    compared = 0
    for kind in kinds:
        for length in (1, 7, 16) if not workers else (7,):
            for config in ({}, {"even_batches": False}, {"split_batches": True}):
                if kind != "batch_sampler" and "split_batches" in config and torch.distributed.get_world_size() != 2:
                    continue
                alone = prepared(make(kind, length, workers), dispatch=False, **config)
                dealt = prepared(make(kind, length, workers), dispatch=True, **config)
                for _ in range(2):
                    mine, theirs = contents(dealt), contents(alone)
                    assert mine == theirs, (kind, length, config)
                    compared += len(mine)
                assert dealt.state_dict() == alone.state_dict()
                if torch.distributed.get_rank() and not workers:
                    data = dealt.dataset.data if kind == "stream" else dealt.dataset
                    assert data.read == 0
    return compared


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_what_it_would_have_read(world_size: int) -> None:
    kinds = ["sequential", "shuffled", "drop_last", "batch_sampler", "stream"]
    assert sum(run_ranks(compare, world_size, kinds, 0)) > 200


def test_rank_0_may_have_workers() -> None:
    assert sum(run_ranks(compare, 2, ["shuffled", "stream"], 2)) > 10


def resume(kind: str) -> None:
    whole = contents(prepared(make(kind, 15, 0), dispatch=True))
    for place in range(len(whole) + 1):
        taker = prepared(make(kind, 15, 0), dispatch=True)
        batches = iter(taker)
        for _ in range(place):
            next(batches)
        state = json.loads(json.dumps(taker.state_dict()))
        batches.close()  # type: ignore[attr-defined]
        resumed = prepared(make(kind, 15, 0), dispatch=True)
        resumed.load_state_dict(state)
        assert contents(resumed) == whole[place:], (kind, place)
        if place:
            resumed.load_state_dict(state)
            other = prepared(make(kind, 15, 0), dispatch=False)  # the place does not depend on who reads
            other.load_state_dict(state)
            assert contents(other) == whole[place:]


@pytest.mark.parametrize("kind", ["shuffled", "batch_sampler", "stream"])
def test_resuming_where_rank_0_reads(kind: str) -> None:
    run_ranks(resume, 2, kind)


def nest() -> list[int]:
    outer = prepared(make("sequential", 8, 0), dispatch=True)
    inner = prepared(make("stream", 6, 0), dispatch=True)
    found: list[int] = []
    for batch in outer:
        found += batch["ids"].tolist()
        for number, other in enumerate(inner):
            found += (100 + other["ids"]).tolist()
            if number == 0:
                break
    return found


def test_loops_may_be_nested_and_left() -> None:
    assert run_ranks(nest, 2) == [
        [0, 1, 100, 101, 4, 5, 100, 101],
        [2, 3, 102, 103, 6, 7, 102, 103],
    ]


def share_samples() -> list[int]:
    rank = torch.distributed.get_rank()
    topology = Topology(rank=rank, world_size=4, mesh=MeshShape(dp_shard=2, tp=2))
    loader = prepared(make("sequential", 8, 0), dispatch=True, topology=topology)
    return [each for batch in loader for each in batch["ids"].tolist()]


def test_ranks_of_one_data_rank_get_the_same() -> None:
    assert run_ranks(share_samples, 4) == [[0, 1, 4, 5]] * 2 + [[2, 3, 6, 7]] * 2


def fail(kind: str) -> tuple[int, str]:
    data = Guarded(20, breaks_at=9)
    loader = prepared(DataLoader(data, batch_size=2, collate_fn=keep), dispatch=True)
    got = 0
    try:
        for _ in loader:
            got += 1
    except Exception as error:
        return got, f"{type(error).__name__}: {error}"
    return got, ""


def test_what_fails_on_rank_0_ends_all() -> None:
    (first, error), (second, told) = run_ranks(fail, 2, "")
    assert first == second == 2
    assert error.startswith("SampleError: Sample 9 was asked for by the loader 'train loader' on data rank 0")
    assert told.startswith(DispatchError.__name__)
    assert "storage went away" in told


def mask(rows: list[dict[str, Any]]) -> list[Any]:
    return [[row["id"] for row in rows], random.random()]


class Divisible(Stream):
    """Could divide itself, and is read whole where rank 0 reads."""

    num_shards = 2

    def shard(self, num_shards: int, index: int) -> Stream:
        raise AssertionError("rank 0 reads for all")


def draw_alike() -> None:
    for kind in ("map", "stream"):
        data: Any = Guarded(11) if kind == "map" else Stream(11)
        alone, dealt = (
            prepared(DataLoader(data, batch_size=2, collate_fn=mask), dispatch=dispatch) for dispatch in (False, True)
        )
        mine = list(dealt)
        assert mine == list(alone)
        drawn = [value for _, value in mine]
        assert len(set(drawn)) == len(drawn)
        others: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(others, drawn)
        assert len({value for each in others for value in each}) == sum(map(len, others))
    whole = prepared(DataLoader(Divisible(8), batch_size=2, collate_fn=keep), dispatch=True)
    assert len(contents(whole)) == 2


def test_collation_draws_alike_whoever_reads() -> None:
    run_ranks(draw_alike, 2)
