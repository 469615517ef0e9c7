"""``torchdata``: its StatefulDataLoader and its nodes, prepared like any loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchdata.nodes as nodes
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader
from accel_state.topology import Topology

ROWS = 101
GLOBAL_BATCH = 12

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


class Numbers(IterableDataset[int]):
    """The numbers from 0 on, divided among workers, with a state as torchdata asks for one."""

    def __init__(self) -> None:
        self.done = 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        while (number := first + self.done * step) < ROWS:
            self.done += 1
            self.read.append(number)
            yield number
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def stateful(dataset: Any, rank: int, world: int, *, workers: int = 0, shuffle: bool | None = None) -> ShardedLoader:
    loader = StatefulDataLoader(
        dataset,
        batch_size=GLOBAL_BATCH // world,
        shuffle=shuffle,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    return prepare(loader, rank, world)


def prepare(loader: Any, rank: int, world: int) -> ShardedLoader:
    return prepare_data_loader(
        loader, topology=Topology(rank=rank, world_size=world), config=DataLoaderConfiguration(data_seed=1)
    )


def steps_of(ranks: list[ShardedLoader]) -> dict[int, list[int]]:
    """Of every step the numbers of all ranks that are no padding, in order of rank."""
    steps: dict[int, list[int]] = {}
    for rank, loader in enumerate(ranks):
        for batch in loader:
            info = loader.batch_info
            assert info is not None
            steps.setdefault(info.index, []).extend(batch.tolist()[: info.real_rows[rank]])
    return dict(sorted(steps.items()))


def flat(steps: dict[int, list[int]]) -> list[int]:
    return [each for rows in steps.values() for each in rows]


def state_after(ranks: list[ShardedLoader], num_steps: int) -> dict[str, Any]:
    states = set()
    for loader in ranks:
        batches = iter(loader)
        for _ in range(num_steps):
            next(batches, None)
        states.add(json.dumps(loader.state_dict()))
        batches.close()  # type: ignore[attr-defined]
    (state,) = states
    return json.loads(state)  # type: ignore[no-any-return]


def resumed(ranks: list[ShardedLoader], state: dict[str, Any]) -> list[ShardedLoader]:
    for loader in ranks:
        loader.load_state_dict(state)
    return ranks


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_stateful_data_loader(world: int, kind: str, workers: int) -> None:
    if workers and world == 3:
        pytest.skip("worker processes for the others are enough")

    def new() -> list[ShardedLoader]:
        if kind == "map":
            return [stateful(list(range(ROWS)), rank, world, workers=workers, shuffle=True) for rank in range(world)]
        return [stateful(Numbers(), rank, world, workers=workers) for rank in range(world)]

    whole = steps_of(new())
    assert sorted(flat(whole)) == list(range(ROWS))
    for stop in (1, 4, len(whole) - 1, len(whole)):
        ranks = resumed(new(), state_after(new(), stop))
        assert steps_of(ranks) == {index: rows for index, rows in whole.items() if index >= stop}
        assert sorted(flat(steps_of(ranks))) == list(range(ROWS))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_stateful_data_loader_in_another_world(kind: str, before: int, after: int) -> None:
    def new(world: int) -> list[ShardedLoader]:
        if kind == "map":
            return [stateful(list(range(ROWS)), rank, world, shuffle=True) for rank in range(world)]
        return [stateful(Numbers(), rank, world) for rank in range(world)]

    whole = steps_of(new(before))
    for stop in (1, 4, len(whole)):
        rest = steps_of(resumed(new(after), state_after(new(before), stop)))
        assert rest == {index: rows for index, rows in whole.items() if index >= stop}


def test_an_iterable_with_a_state_reads_nothing_twice() -> None:
    state = state_after([stateful(Numbers(), 0, 1)], 4)
    dataset = Numbers()
    rest = flat(steps_of(resumed([stateful(dataset, 0, 1)], state)))
    assert dataset.read == rest == list(range(4 * GLOBAL_BATCH, ROWS))


def batches_of(kind: str) -> nodes.Loader:  # type: ignore[type-arg]
    """A pipeline of nodes that gives tensors of at most eight numbers."""
    numbers: Any = nodes.IterableWrapper(range(ROWS))
    if kind == "sampled":
        order = RandomSampler(range(ROWS), generator=torch.Generator().manual_seed(7))
        numbers = nodes.MapStyleWrapper(list(range(ROWS)), order)
    if kind == "parallel":
        numbers = nodes.MapStyleWrapper(list(range(ROWS)), SequentialSampler(range(ROWS)))
        numbers = nodes.ParallelMapper(numbers, abs, num_workers=2, method="thread")
    batches: Any = nodes.Mapper(nodes.Batcher(numbers, 8, drop_last=False), torch.tensor)
    if kind == "prefetched":
        batches = nodes.Prefetcher(batches, prefetch_factor=3, snapshot_frequency=2)
    return nodes.Loader(batches)


@pytest.mark.parametrize("kind", ["plain", "sampled", "parallel", "prefetched"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_nodes(kind: str, world: int) -> None:
    """Each batch of the nodes goes to one rank: padding is a whole batch."""

    def new() -> list[ShardedLoader]:
        return [prepare(batches_of(kind), rank, world) for rank in range(world)]

    def real(ranks: list[ShardedLoader]) -> dict[int, list[int]]:
        steps: dict[int, list[int]] = {}
        for rank, loader in enumerate(ranks):
            for batch in loader:
                info = loader.batch_info
                assert info is not None
                steps.setdefault(info.index, []).extend(batch.tolist() if info.real_rows[rank] else [])
        return dict(sorted(steps.items()))

    whole = real(new())
    assert sorted(flat(whole)) == list(range(ROWS))
    for stop in (1, 3, len(whole)):
        ranks = resumed(new(), state_after(new(), stop))
        assert real(ranks) == {index: rows for index, rows in whole.items() if index >= stop}
        assert sorted(flat(real(ranks))) == list(range(ROWS))
