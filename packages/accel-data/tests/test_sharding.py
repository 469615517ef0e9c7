"""Sharding rules for map-style datasets, and loaders that are sharded already."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader
from accel_state.errors import ConfigError
from accel_state.testing import run_ranks
from accel_state.topology import Topology

Shards = Callable[[Any, int, int], Any]


def loaders(make: Callable[[int], Any], world: int, local: int = 1, **config: Any) -> list[ShardedLoader]:
    first = Topology(world_size=world, local_world_size=local)
    settings = DataLoaderConfiguration(**{"data_seed": 5, **config})
    return [
        prepare_data_loader(make(rank), topology=first.at(rank), config=settings, name="train loader")
        for rank in range(world)
    ]


def rows_of(ranks: list[ShardedLoader]) -> list[list[list[int]]]:
    """Of each global batch the real ids of each rank."""
    steps: dict[int, list[list[int]]] = {}
    for rank, loader in enumerate(ranks):
        for batch in loader:
            info = loader.batch_info
            assert info is not None
            assert len(batch) == info.rows[rank]
            steps.setdefault(info.index, [[] for _ in ranks])[rank] = batch.tolist()[: info.real_rows[rank]]
    return [steps[index] for index in sorted(steps)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("length", [16, 19, 5])
def test_each_node_reads_its_block(length: int, even: bool, shuffle: bool) -> None:
    data: Any = range(length)
    ranks = loaders(lambda _: DataLoader(data, batch_size=2, shuffle=shuffle), 4, 2, sharding="node", even_batches=even)
    for _ in range(2):
        steps = rows_of(ranks)
        nodes = [
            [each for step in steps for rank in (2 * node, 2 * node + 1) for each in step[rank]] for node in (0, 1)
        ]
        half = length // 2
        assert sorted(nodes[0]) == list(range(half))
        assert sorted(nodes[1]) == list(range(half, length))
        if not shuffle:
            assert nodes[0] + nodes[1] == list(range(length))


def test_orders_of_parts_and_epochs_differ() -> None:
    data: Any = range(32)
    ranks = loaders(lambda _: DataLoader(data, batch_size=16, shuffle=True), 2, sharding="node")
    (first,), (second,) = rows_of(ranks), rows_of(ranks)
    assert first != second
    assert [each - 16 for each in first[1]] != first[0]


def by_stripes(dataset: Any, num_parts: int, part: int) -> Any:
    return Subset(dataset, range(part, len(dataset), num_parts))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_rule_of_the_users(world: int) -> None:
    data: Any = range(20)
    steps = rows_of(loaders(lambda _: DataLoader(data, batch_size=3, shuffle=True), world, sharding=by_stripes))
    for rank in range(world):
        assert sorted(each for step in steps for each in step[rank]) == list(range(rank, 20, world))


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("sharding", ["node", by_stripes])
def test_parts_are_resumed_from_their_places(sharding: Any, place: int) -> None:
    data: Any = range(19)

    def make() -> list[ShardedLoader]:
        return loaders(lambda _: DataLoader(data, batch_size=2, shuffle=True), 3, sharding=sharding)

    whole = rows_of(make())
    taken = []
    for loader in make():
        batches = iter(loader)
        for _ in range(place):
            next(batches)
        taken.append(json.dumps(loader.state_dict()))
    assert len(set(taken)) == 1
    resumed = make()
    for loader in resumed:
        loader.load_state_dict(json.loads(taken[0]))
    assert rows_of(resumed) == whole[place:]
    other = loaders(lambda _: DataLoader(data, batch_size=2, shuffle=True), 2, sharding=sharding)[0]
    if place:
        with pytest.raises(ConfigError, match=r"in 3 parts, and it is divided into 2 now.*Start as many nodes"):
            other.load_state_dict(json.loads(taken[0]))


def test_skipping_in_parts() -> None:
    data: Any = range(19)
    whole = rows_of(loaders(lambda _: DataLoader(data, batch_size=2), 2, sharding="node"))
    for num in range(7):
        ranks = loaders(lambda _: DataLoader(data, batch_size=2), 2, sharding="node")
        assert rows_of([loader.skip_first(num) for loader in ranks]) == whole[num:]  # type: ignore[misc]


class Slices(Dataset[int]):
    """A dataset of which each rank holds other samples."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> int:
        return self.ids[index]


def read_given(kind: str) -> list[list[int]]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    topology = Topology(rank=rank, world_size=world)
    data: Any = range(24)
    own = Slices(list(range(10 * rank, 10 * rank + 4 + 3 * rank)))
    sampler: Any = DistributedSampler(data, world, rank, seed=3)
    user: DataLoader[Any] = {
        "dataset": lambda: DataLoader(own, batch_size=2, shuffle=True),
        "sampler": lambda: DataLoader(data, batch_size=2, sampler=sampler),
    }[kind]()
    loader = prepare_data_loader(user, topology=topology, config=DataLoaderConfiguration(sharding="given", data_seed=1))
    found: list[list[int]] = []
    for _ in range(2):
        epoch = []
        for batch in loader:
            assert loader.batch_info is not None
            epoch += batch.tolist()[: loader.batch_info.real_rows[rank]]
        found.append(epoch)
    return found


def test_parts_that_are_given_are_kept() -> None:
    ranks = run_ranks(read_given, 2, "dataset")
    for rank, epochs in enumerate(ranks):
        assert [sorted(epoch) for epoch in epochs] == [list(range(10 * rank, 10 * rank + 4 + 3 * rank))] * 2
    ranks = run_ranks(read_given, 2, "sampler")
    for epoch in range(2):
        assert sorted(ranks[0][epoch] + ranks[1][epoch]) == list(range(24))
    assert ranks[0][0] != ranks[0][1]  # it was told the epoch


def differ_in_length() -> str:
    rank = torch.distributed.get_rank()
    data: Any = range(10 + rank)
    with pytest.raises(ConfigError, match=r"has 10, 11 samples on ranks 0 to 1.*Give every rank the same dataset") as e:
        prepare_data_loader(DataLoader(data, batch_size=2), topology=Topology(rank=rank, world_size=2))
    return str(e.value)


def test_ranks_with_other_data_are_refused() -> None:
    first, second = run_ranks(differ_in_length, 2)
    assert first == second


class Aware(BatchSampler):
    """A batch sampler that knows of ranks."""

    def __init__(self) -> None:
        super().__init__(range(8), 2, False)
        self.world_size, self.rank = 2, 0


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            lambda data: DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, 0)),
            {},
            r"has a `DistributedSampler`, which gives out one of 2 parts already.*sharding=\"given\"",
        ),
        (lambda data: DataLoader(data, batch_sampler=Aware()), {}, "has a `Aware`, which gives out one of 2 parts"),
        (
            lambda data: DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, 0)),
            {"sharding": "given"},
            r"`DistributedSampler` that repeats 1 of 9 samples without saying which.*drop_last=True",
        ),
        (
            lambda data: DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 3, 0, drop_last=True)),
            {"sharding": "given"},
            r"is divided into 3 parts, and `sharding=\"given\"` keeps them for 2 data ranks",
        ),
        (
            lambda data: DataLoader(data, batch_size=2, sampler=WeightedRandomSampler([1.0] * 9, 9)),
            {"sharding": "node"},
            "`WeightedRandomSampler`, which orders the whole dataset, and `sharding='node'` divides that",
        ),
        (
            lambda data: DataLoader(data, batch_size=2),
            {"sharding": lambda dataset, num, part: None},
            "sharding rule of the train loader gave a `NoneType` for part 0 of 2 of a `range`",
        ),
        (
            lambda data: DataLoader(data, batch_size=2),
            {"sharding": lambda dataset, num, part: Subset(dataset, range(9 * (1 - part)))},
            "Part 1 of the train loader holds no sample",
        ),
    ],
)
def test_loaders_that_cannot_be_divided(make: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaders(lambda _: make(range(9)), 2, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sharding": "file"}, "`sharding='file'` was given, and there is no such rule"),
        ({"sharding": "node", "dispatch_batches": True}, "`dispatch_batches=True` was given with `sharding='node'`"),
        ({"even_batches": 1}, "`even_batches=1` was given, which is not True or False"),
        ({"non_blocking": "yes"}, "`non_blocking='yes'` was given, which is not True or False or None"),
    ],
)
def test_settings_that_cannot_work(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataLoaderConfiguration(**config)


def test_a_dataset_that_grows_is_refused() -> None:
    data: Any = list(range(10))
    (loader,) = loaders(lambda _: DataLoader(data, batch_size=2), 1)
    assert len(rows_of([loader])) == 5
    data.append(10)
    with pytest.raises(
        ConfigError, match=r"had 10 samples when it was prepared, and has 11 now.*Prepare the loader anew"
    ):
        list(loader)


def test_torchs_own_order_can_be_asked_for() -> None:
    data: Any = range(50)
    keyed = loaders(lambda _: DataLoader(data, batch_size=10, shuffle=True), 2)
    torchs = loaders(lambda _: DataLoader(data, batch_size=10, shuffle=True), 2, use_seedable_sampler=False)
    assert [keyed[0].state_dict()["order"], torchs[0].state_dict()["order"]] == ["permutation", "sampler"]
    drawn = rows_of(torchs)
    assert sorted(each for step in drawn for rank in step for each in rank) == list(data)
    assert drawn != rows_of(keyed)


@pytest.mark.parametrize("sharding", ["node", "given", by_stripes])
def test_batch_samplers_have_no_parts(sharding: Any) -> None:
    with pytest.raises(ConfigError, match=r"batch sampler of its own, whose batches are of the whole dataset"):
        loaders(lambda _: DataLoader(range(9), batch_sampler=[[1], [2]]), 2, sharding=sharding)  # type: ignore[arg-type]


def test_random_samplers_of_another_length_have_no_parts() -> None:
    data: Any = range(9)
    with pytest.raises(ConfigError, match="a `RandomSampler`, which orders the whole dataset"):
        loaders(
            lambda _: DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=40)),
            2,
            sharding="node",
        )


class Draws(Dataset[float]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> float:
        return float(torch.rand((), dtype=torch.float64))


def test_samples_of_different_parts_draw_differently() -> None:
    ranks = loaders(lambda _: DataLoader(Draws(), batch_size=2), 2, sharding="node")
    drawn = [each for loader in ranks for batch in loader for each in batch.tolist()]
    assert len(set(drawn)) == 12


class PrivatelyAware:
    """As samplers of some libraries call it."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 2

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        return iter(range(4))


def test_samplers_that_hide_their_rank_are_found() -> None:
    with pytest.raises(ConfigError, match="has a `PrivatelyAware`, which gives out one of 2 parts already"):
        loaders(lambda _: DataLoader(range(8), sampler=PrivatelyAware()), 2)  # type: ignore[arg-type]


def see_other_rows() -> str:
    rank = torch.distributed.get_rank()
    data: Any = Subset(range(16), range(8 * rank, 8 * rank + 8))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"has other samples on ranks 0 to 1.*Give every rank the same dataset") as e:
        prepare_data_loader(DataLoader(data, batch_size=2), topology=Topology(rank=rank, world_size=2))
    return str(e.value)


def test_ranks_with_other_subsets_are_refused() -> None:
    run_ranks(see_other_rows, 2)
