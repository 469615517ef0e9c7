"""Real rows over the ranks, in order of steps and ranks, are the epoch's order exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler

LENGTHS = range(1, 51)
Make = Callable[[int, int], DataLoader[Any]]


class Hidden(Sampler[int]):
    """Draws from python's and torch's default generators, without saying so."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length).tolist()
        random.shuffle(order)
        return iter(order)


class Buckets:
    """Batches of one to `size` indices: a batch sampler that is none of torch's."""

    def __init__(self, length: int, size: int) -> None:
        self.batches: list[list[int]] = []
        start = 0
        while start < length:
            width = 1 + len(self.batches) % size
            self.batches.append(list(range(start, min(length, start + width))))
            start += width

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(random.sample(self.batches, len(self.batches)))


@pytest.fixture
def make(request: pytest.FixtureRequest, counting: Any) -> Make:
    kinds: dict[str, Make] = {
        "sequential": lambda n, b: DataLoader(range(n), batch_size=b),  # type: ignore[arg-type]
        "shuffled": lambda n, b: DataLoader(range(n), batch_size=b, shuffle=True),  # type: ignore[arg-type]
        "sampler": lambda n, b: DataLoader(range(n), batch_size=b, sampler=Hidden(n)),  # type: ignore[arg-type]
        "subset": lambda n, b: DataLoader(range(n), batch_size=b, sampler=SubsetRandomSampler(range(n))),  # type: ignore[arg-type]
        "batch_sampler": lambda n, b: DataLoader(range(n), batch_sampler=Buckets(n, b)),  # type: ignore[arg-type]
        "iterable": lambda n, b: DataLoader(counting(n), batch_size=b),
    }
    return kinds[request.param]


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "make", ["sequential", "shuffled", "sampler", "subset", "batch_sampler", "iterable"], indirect=True
)
def test_every_id_is_real_exactly_once(make: Make, size: int, even: bool, world: Any, real_ids: Any) -> None:
    for length in LENGTHS:
        for batch_size in range(1, 6):
            ranks = world(lambda n=length, b=batch_size: make(n, b), size, even_batches=even)
            steps = ranks.epoch()
            assert sorted(real_ids(steps)) == list(range(length)), (length, batch_size)
            if even:
                assert all(ids for step in steps for ids, _ in step), (length, batch_size)
            else:
                assert all(len(ids) == num for step in steps for ids, num in step), (length, batch_size)
            assert all(loader.epoch == 1 and loader.batch_info is None for loader in ranks.loaders)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", ["sequential", "iterable"], indirect=True)
def test_real_ids_come_in_the_order_of_the_data(make: Make, size: int, world: Any, real_ids: Any) -> None:
    for length in LENGTHS:
        assert real_ids(world(lambda n=length: make(n, 3), size).epoch()) == list(range(length))


@pytest.mark.parametrize("make", ["shuffled", "sampler"], indirect=True)
def test_the_order_does_not_depend_on_the_world(make: Make, world: Any, real_ids: Any) -> None:
    orders = [real_ids(world(lambda: make(37, 2), size).epoch()) for size in (1, 2, 3)]
    assert orders[0] == orders[1] == orders[2] != list(range(37))


@pytest.mark.parametrize("make", ["sequential", "shuffled", "sampler", "iterable"], indirect=True)
def test_len_is_the_number_of_batches_of_each_rank(make: Make, world: Any) -> None:
    for length in LENGTHS:
        for even in (True, False):
            ranks = world(lambda n=length: make(n, 3), 3, even_batches=even)
            if hasattr(ranks.loaders[0].dataset, "__len__"):
                assert [len(loader) for loader in ranks.loaders] == [sum(1 for _ in loader) for loader in ranks.loaders]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_with_workers_and_drop_last(num_workers: int, drop_last: bool, world: Any, real_ids: Any) -> None:
    ranks = world(
        lambda: DataLoader(range(23), batch_size=3, shuffle=True, drop_last=drop_last, num_workers=num_workers), 2
    )
    ids = real_ids(ranks.epoch())
    assert len(ids) == len(set(ids)) == (18 if drop_last else 23)


def test_split_batches_take_the_batch_size_as_the_global_one(world: Any, real_ids: Any) -> None:
    ranks = world(lambda: DataLoader(range(22), batch_size=6), 3, split_batches=True)  # type: ignore[arg-type]
    steps = ranks.epoch()
    assert [len(ids) for ids, _ in steps[0]] == [2, 2, 2]
    assert (ranks.loaders[0].batch_size, ranks.loaders[0].total_batch_size) == (2, 6)
    assert real_ids(steps) == list(range(22))
    buckets = world(lambda: DataLoader(range(22), batch_sampler=Buckets(22, 4)), 3, split_batches=True)  # type: ignore[arg-type]
    steps = buckets.epoch()
    assert len(steps) == len(buckets.loaders[0]) == len(Buckets(22, 4))
    assert sorted(real_ids(steps)) == list(range(22))


def test_peers_of_one_data_rank_see_the_same(world: Any) -> None:
    from accel_data import DataLoaderConfiguration, prepare_data_loader
    from accel_state.topology import MeshShape, Topology

    seen = {}
    mesh = MeshShape(dp_shard=2, cp=2, tp=2)
    for rank in range(8):
        topology = Topology(rank=rank, world_size=8, mesh=mesh)
        loader = prepare_data_loader(
            DataLoader(range(20), batch_size=2, shuffle=True),  # type: ignore[arg-type]
            topology=topology,
            config=DataLoaderConfiguration(data_seed=1),
        )
        seen[rank] = [batch.tolist() for batch in loader]
    assert all(seen[rank] == seen[rank // 4 * 4] for rank in range(8))
    assert seen[0] != seen[4]


@pytest.mark.parametrize("size", [1, 2])
def test_no_samples_make_an_empty_epoch(size: int, world: Any, counting: Any) -> None:
    for make in (
        lambda: DataLoader([], batch_size=2),
        lambda: DataLoader([], batch_sampler=[]),  # type: ignore[var-annotated]
        lambda: DataLoader(counting(0), batch_size=2),
    ):
        ranks = world(make, size)
        assert ranks.epoch() == []
        assert ranks.loaders[0].epoch == 1


@pytest.mark.parametrize("offset", [0, 13])
def test_plans_of_many_chunks_have_no_seams(offset: int) -> None:
    from accel_data.order import SequentialOrder
    from accel_data.partition import GlobalBatches
    from accel_data.sampler import SamplePlan

    length = 60_000
    cut = GlobalBatches(num_samples=length - offset, batch_size=7, world=2, even=False)
    ranks = [
        [rows.indices for rows in SamplePlan(SequentialOrder(length), cut, offset=offset).batches(rank)]
        for rank in range(2)
    ]
    assert [each for step in zip(*ranks, strict=True) for ids in step for each in ids] == list(range(offset, length))
