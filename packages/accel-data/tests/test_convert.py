"""What can be prepared, with which settings, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader, skip_first_batches
from accel_state.errors import ConfigError
from accel_state.topology import Topology

DATA: Any = range(20)
PAIR = Topology(rank=1, world_size=2)


def prepare(loader: Any, topology: Topology = PAIR, **config: Any) -> ShardedLoader:
    settings = DataLoaderConfiguration(**({"data_seed": 0} if topology.world_size > 1 else {}) | config)
    return prepare_data_loader(loader, topology=topology, config=settings, name="train loader")


def test_preparing_twice_shards_once() -> None:
    loader = prepare(DataLoader(DATA, batch_size=2))
    assert prepare(loader) is loader
    assert prepare_data_loader(loader, topology=PAIR) is loader


def order_of(loader: ShardedLoader) -> list[int]:
    return [each for batch in loader for each in batch.tolist()]


def test_the_seed_is_drawn_from_the_default_generator() -> None:
    def order(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return order_of(prepare(DataLoader(DATA, batch_size=2, shuffle=True), Topology()))

    assert order(1) == order(1) != order(2)


def test_the_seed_is_drawn_from_the_loaders_generator() -> None:
    def order(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        before = torch.get_rng_state()
        loader = prepare(DataLoader(DATA, batch_size=2, shuffle=True, generator=generator), Topology())
        assert torch.equal(before, torch.get_rng_state())
        return order_of(loader)

    assert order(1) == order(1) != order(2)


def test_the_generator_of_a_sampler_counts_where_the_loader_has_none() -> None:
    def order(seed: int) -> list[int]:
        sampler = RandomSampler(DATA, generator=torch.Generator().manual_seed(seed))
        return order_of(prepare(DataLoader(DATA, batch_size=2, sampler=sampler), Topology()))

    assert order(1) == order(1) != order(2)


def test_a_data_seed_draws_nothing() -> None:
    before = torch.get_rng_state()
    loader = prepare(DataLoader(DATA, batch_size=2, shuffle=True), data_seed=3)
    assert loader.seed == 3
    order_of(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.0, True])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(ConfigError, match="a seed is an integer from 0"):
        DataLoaderConfiguration(data_seed=seed)


class Told:
    """A sampler that draws from everywhere and is told the epoch."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        order = torch.randperm(20, generator=self.generator).tolist()
        random.shuffle(order)
        np.random.shuffle(order)
        return iter([order[each] for each in torch.randperm(20).tolist()])


def test_a_users_sampler_draws_aside_and_repeats() -> None:
    import numpy as np

    sampler = Told()
    loader = prepare(DataLoader(DATA, batch_size=2, sampler=sampler), Topology(), data_seed=1)

    def states() -> list[Any]:
        drawn = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
        return [*drawn, sampler.generator.get_state().tolist()]

    before = states()
    epochs = [order_of(loader) for _ in range(3)]
    assert states() == before
    assert sampler.epochs == [0, 1, 2]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    random.seed(77), np.random.seed(7), torch.manual_seed(7), sampler.generator.manual_seed(9)
    loader.set_epoch(1)
    assert order_of(loader) == epochs[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda sampler: DataLoader(DATA, batch_size=2, sampler=sampler),
        lambda sampler: DataLoader(DATA, batch_sampler=BatchSampler(sampler, 2, False)),
    ],
)
def test_samplers_that_know_of_ranks_are_refused_with_both_ways_out(make: Any) -> None:
    sampler = DistributedSampler(DATA, num_replicas=2, rank=1)
    message = "`DistributedSampler`, which gives out one of 2 parts.*Either build the loader without it.*or leave"
    with pytest.raises(ConfigError, match=message):
        prepare(make(sampler))
    with pytest.raises(ConfigError, match=message):
        prepare(make(sampler), Topology())
    alone = DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=False)
    assert order_of(prepare(make(alone), Topology())) == list(range(20))


def test_batch_samplers_that_know_of_ranks_are_refused() -> None:
    class Aware(BatchSampler):
        num_replicas, rank = 4, 2

    with pytest.raises(ConfigError, match="`Aware`, which gives out one of 4 parts"):
        prepare(DataLoader(DATA, batch_sampler=Aware(SequentialSampler(DATA), 2, False)))


def test_a_batch_size_that_the_world_does_not_divide() -> None:
    topology = Topology(world_size=3)
    with pytest.raises(ConfigError, match=r"`batch_size=8` of the train loader.*3 data ranks.*Set it to 6 or 9"):
        prepare(DataLoader(DATA, batch_size=8), topology, split_batches=True)
    with pytest.raises(ConfigError, match=r"Set it to 3, or set `split_batches=False`"):
        prepare(DataLoader(DATA, batch_size=2), topology, split_batches=True)
    assert prepare(DataLoader(DATA, batch_size=9), topology, split_batches=True).batch_size == 3


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(20))


class NoLength:
    def __getitem__(self, index: int) -> int:
        return index


class Endless:
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [1, 2, 3], r"A `list` was given as train loader, and only a `torch.utils.data.DataLoader`"),
        (lambda: DataLoader(DATA, in_order=False), "built with `in_order=False`"),
        (lambda: DataLoader(DATA, sampler=Endless()), "The sampler of the train loader, a `Endless`, has no length"),
        (lambda: DataLoader(DATA, batch_sampler=Endless()), "a `Endless`, has no length"),
        (lambda: DataLoader(NoLength(), sampler=[1, 2]), "The dataset of the train loader, a `NoLength`, has no"),
    ],
)
def test_loaders_that_cannot_be_sharded(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(make())


def test_settings_of_the_users_loader_are_kept() -> None:
    def collate(rows: list[int]) -> tuple[int, ...]:
        return tuple(rows)

    user = DataLoader(
        DATA, batch_size=3, num_workers=1, prefetch_factor=5, collate_fn=collate, timeout=30, persistent_workers=True,
        multiprocessing_context="fork",
    )  # fmt: skip
    loader = prepare(user, Topology())
    inner = loader._source._feed._loader
    for name in ("num_workers", "prefetch_factor", "timeout", "persistent_workers"):
        assert getattr(inner, name) == getattr(user, name), name
    assert inner.multiprocessing_context.get_start_method() == "fork"
    assert next(iter(loader)) == (0, 1, 2)


def test_a_batch_sampler_says_its_size_or_not() -> None:
    class Sized(list):  # type: ignore[type-arg]
        batch_size = 4

    assert prepare(DataLoader(DATA, batch_sampler=Sized([[1], [2]]))).total_batch_size == 8
    assert prepare(DataLoader(DATA, batch_sampler=Sized([[1], [2]])), split_batches=True).batch_size == 2
    unsized = prepare(DataLoader(DATA, batch_sampler=[[1], [2]]))
    assert (unsized.batch_size, unsized.total_batch_size) == (None, None)
    assert unsized.total_dataset_length == 20


def test_plain_loaders_are_skipped_without_fetching(recording: Any) -> None:
    for shuffle in (False, True):
        dataset = recording(20)
        plain = DataLoader(dataset, batch_size=3, shuffle=shuffle)
        torch.manual_seed(0)
        whole = [batch.tolist() for batch in plain]
        dataset.asked.clear()
        torch.manual_seed(0)
        skipping = skip_first_batches(plain, 4)
        assert isinstance(skipping, DataLoader)
        assert len(skipping) == 3
        assert [batch.tolist() for batch in skipping] == whole[4:]
        assert len(dataset.asked) == 8
        assert len([*skipping]) == len(skipping) == 7
    single = skip_first_batches(DataLoader(DATA, batch_size=None), 17)
    assert [int(each) for each in single] == [17, 18, 19]


def test_other_loaders_are_skipped_by_their_place() -> None:
    stream = skip_first_batches(DataLoader(Stream(), batch_size=6), 2)
    assert isinstance(stream, ShardedLoader)
    assert [batch.tolist() for batch in stream] == [[12, 13, 14, 15, 16, 17], [18, 19]]
    loader = prepare(DataLoader(DATA, batch_size=5), Topology())
    assert [batch.tolist() for batch in skip_first_batches(loader, 3)] == [[15, 16, 17, 18, 19]]
    assert len(list(skip_first_batches(loader))) == 4


@pytest.mark.parametrize("num", [-1, 1.5, False])
def test_skips_that_are_no_counts(num: Any) -> None:
    with pytest.raises(ConfigError, match="no number of batches"):
        skip_first_batches(DataLoader(DATA), num)


class Workers(IterableDataset[int]):
    """Reads the part that ``worker_init_fn`` gave to its copy, and notes the epochs it was told."""

    def __init__(self) -> None:
        self.part = [0]
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch, *self.part])


def give_part(worker_id: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Workers)
    info.dataset.part = [10 * worker_id + each for each in (1, 2, 3)]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_users_dataset_and_every_epoch(persistent: bool) -> None:
    loader = prepare(
        DataLoader(Workers(), batch_size=2, num_workers=2, worker_init_fn=give_part, persistent_workers=persistent),
        Topology(),
    )
    for epoch in range(3):
        batches = [batch.tolist() for batch in loader]
        assert batches == [[epoch, 1], [epoch, 11], [2, 3], [12, 13]]
    del loader


def test_uneven_streams_count_steps_in_which_a_rank_has_no_part() -> None:
    def run(rank: int) -> list[Any]:
        loader = prepare(
            DataLoader(Workers(), batch_size=1, num_workers=2, worker_init_fn=give_part),
            Topology(rank=rank, world_size=3),
            even_batches=False,
        )
        found = []
        for batch in loader:
            assert loader.batch_info is not None
            found.append((loader.batch_info.index, batch.tolist()))
        return found

    assert [run(rank) for rank in range(3)] == [
        [(0, [0]), (1, [0]), (2, [3]), (3, [13])],
        [(0, [1]), (1, [11])],
        [(0, [2]), (1, [12])],
    ]


def test_drop_last_of_a_stream() -> None:
    loader = prepare(DataLoader(Stream(), batch_size=3, drop_last=True), Topology(rank=0, world_size=2))
    infos = [loader.batch_info for _ in loader]
    assert len(infos) == 3
    assert infos[-1] is not None
    assert (infos[-1].remaining, infos[-1].may_pad) == (0, False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_with_workers_is_skipped_too(workers: int) -> None:
    plain = DataLoader(DATA, batch_size=4, num_workers=workers)
    skipped = skip_first_batches(plain, 2)
    assert [each for batch in skipped for each in batch.tolist()] == list(range(8, 20))


class Doubling(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda: Doubling(DATA, batch_size=2), {}, "is a `Doubling`, which iterates in a way of its own"),
        (
            lambda: DataLoader(DATA, batch_size=None),
            {"split_batches": True},
            "was built with `batch_size=None`, so its",
        ),
        (lambda: torch.nn.Sequential(), {}, "A `Sequential` was given as train loader"),
    ],
)
def test_more_that_cannot_be_sharded(make: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(make(), **config)


def test_without_a_group_nobody_can_agree() -> None:
    loader = DataLoader(DATA, batch_size=2, shuffle=True)
    with pytest.raises(ConfigError, match="no process group of that size by which they could agree on the seed"):
        prepare_data_loader(loader, topology=PAIR)
    with pytest.raises(ConfigError, match="by which they could hand out what rank 0 reads"):
        prepare(loader, dispatch_batches=True)
