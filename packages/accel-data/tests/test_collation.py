"""Collation that draws: the same batch whoever collates it, and nothing outside notices."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader
from accel_state.topology import Topology

DRAWS = {
    "python": random.random,
    "numpy": lambda: float(np.random.random()),
    "torch": lambda: float(torch.rand((), dtype=torch.float64)),
}


class Masking:
    """Draws a number for each batch; for some batches only, if `some`."""

    def __init__(self, kind: str, *, some: bool = False) -> None:
        self.kind = kind
        self.some = some

    def __call__(self, rows: list[Any]) -> tuple[list[int], float]:
        ids = [int(row[0]) if isinstance(row, tuple) else int(row) for row in rows]
        return ids, 0.0 if self.some and 11 not in ids else DRAWS[self.kind]()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        return iter(range(30) if info is None else range(info.id, 30, info.num_workers))


def prepared(data: str, collate: Any, *, workers: int = 0, rank: int = 0, world: int = 1) -> ShardedLoader:
    dataset: Any = {"map": range(30), "tensors": TensorDataset(torch.arange(30)), "stream": Stream()}[data]
    user = DataLoader(
        dataset, batch_size=4, shuffle=None if data == "stream" else True, collate_fn=collate, num_workers=workers
    )
    return prepare_data_loader(
        user, topology=Topology(rank=rank, world_size=world), config=DataLoaderConfiguration(data_seed=2)
    )


def states() -> Any:
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("kind", list(DRAWS))
@pytest.mark.parametrize("data", ["map", "tensors", "stream"])
def test_a_batch_comes_out_alike_after_resuming(data: str, kind: str, some: bool) -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = states()
    loader = prepared(data, Masking(kind, some=some))
    epochs = [list(loader), list(loader)]
    assert states() == before
    drawn = [value for epoch in epochs for _, value in epoch if value]
    assert len(set(drawn)) == len(drawn) == (2 if some else 16)
    random.seed(77), np.random.seed(77), torch.manual_seed(77)
    for place in range(1, 8):
        taker = prepared(data, Masking(kind, some=some))
        batches = iter(taker)
        for _ in range(place):
            next(batches)
        resumed = prepared(data, Masking(kind, some=some))
        resumed.load_state_dict(json.loads(json.dumps(taker.state_dict())))
        assert list(resumed) == epochs[0][place:]
        assert list(resumed) == epochs[1]


@pytest.mark.parametrize("data", ["map", "tensors"])
def test_workers_make_no_difference(data: str) -> None:
    assert list(prepared(data, Masking("torch"), workers=2)) == list(prepared(data, Masking("torch")))


@pytest.mark.parametrize("data", ["map", "stream"])
def test_ranks_draw_differently(data: str) -> None:
    first, second = (list(prepared(data, Masking("python"), rank=rank, world=2)) for rank in range(2))
    assert not {value for _, value in first} & {value for _, value in second}
