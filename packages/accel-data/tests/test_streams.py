"""Streams that know their place, in parts that ranks share out: every sample once, and the rest from anywhere."""

from __future__ import annotations

import gc
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from accel_data import DataLoaderConfiguration, SampleError, ShardedLoader, prepare_data_loader
from accel_state.errors import CollectiveError, ConfigError
from accel_state.testing import run_ranks
from accel_state.topology import Topology


class Shards(IterableDataset[int]):
    """Shards of ids one after the other; divides them among parts and workers, and knows its place."""

    def __init__(self, shards: list[list[int]], *, shuffled: bool = False) -> None:
        self.shards = shards
        self.num_shards = len(shards)
        self.shuffled = shuffled
        self.epoch = 0
        self.read = 0
        self.place: tuple[int, int] = (0, 0)
        self.loaded: tuple[int, int] | None = None

    def shard(self, num_shards: int, index: int) -> Shards:
        return Shards(self.shards[index::num_shards], shuffled=self.shuffled)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"shard": self.place[0], "row": self.place[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = (state["shard"], state["row"])

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        mine = self.shards if info is None else self.shards[info.id :: info.num_workers]
        if self.shuffled:
            mine = [random.Random(self.epoch).sample(each, len(each)) for each in mine]
        first, row = self.loaded or (0, 0)
        self.loaded = None
        for number in range(first, len(mine)):
            for place in range(row, len(mine[number])):
                self.place = (number, place + 1)
                self.read += 1
                yield mine[number][place]
            row = 0


class Plain(IterableDataset[int]):
    """The same without a state."""

    def __init__(self, shards: list[list[int]]) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[int]:
        yield from (each for shard in self.shards for each in shard)


def ids(sizes: list[int]) -> list[list[int]]:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


SIZES = [7, 4, 9, 6]


def prepare(
    dataset: Any, rank: int, world: int, *, batch_size: int = 2, workers: int = 0, **config: Any
) -> ShardedLoader:
    settings = DataLoaderConfiguration(**{"data_seed": 3, **config})
    return prepare_data_loader(
        DataLoader(dataset, batch_size=batch_size, num_workers=workers),
        topology=Topology(rank=rank, world_size=world),
        config=settings,
        name="train loader",
    )


def steps_of(ranks: list[ShardedLoader]) -> list[list[tuple[list[int], int, int]]]:
    """Of each global batch, of each rank: real ids, rows, and whether the epoch ends."""
    steps: dict[int, Any] = {}
    for rank, loader in enumerate(ranks):
        for batch in loader:
            info = loader.batch_info
            assert info is not None
            assert len(batch) == info.rows[rank]
            entry = (batch.tolist()[: info.real_rows[rank]], info.rows[rank], info.remaining)
            steps.setdefault(info.index, [([], 0, None) for _ in ranks])[rank] = entry
    return [steps[index] for index in sorted(steps)]


def real(steps: list[Any]) -> list[list[int]]:
    """Of each global batch its real ids in order."""
    return [[each for ids, _, _ in step for each in ids] for step in steps]


def state_after(ranks: list[ShardedLoader], place: int) -> dict[str, Any]:
    """The state in the body of batch number `place`; the ranks must agree on it."""
    states = []
    for loader in ranks:
        batches = iter(loader)
        for _ in range(place):
            next(batches, None)
        states.append(json.dumps(loader.state_dict()))
    assert len(set(states)) == 1
    return json.loads(states[0])  # type: ignore[no-any-return]


def world_of(make: Any, world: int, **settings: Any) -> list[ShardedLoader]:
    return [prepare(make(), rank, world, **settings) for rank in range(world)]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_rank_reads_its_shards_and_every_sample_once(world: int, workers: int, even: bool) -> None:
    if workers and (world == 4 or not even):
        pytest.skip("worker processes for these are enough")
    ranks = world_of(lambda: Shards(ids(SIZES)), world, workers=workers, even_batches=even)
    for _ in range(2):
        steps = steps_of(ranks)
        assert sorted(each for step in real(steps) for each in step) == list(range(26))
        for step in steps:
            rows = [entry[1] for entry in step]
            assert not even or len(set(rows)) == 1
        assert [entry[2] for entry in steps[-1] if entry[1]].count(0) == len([1 for entry in steps[-1] if entry[1]])
        assert all(entry[2] is None for step in steps[:-1] for entry in step)
    if world == 2 and not workers:
        assert {each for step in steps for each in step[0][0]} == {*range(7), *range(11, 20)}


def test_the_last_steps_are_left_out_where_asked() -> None:
    settings = DataLoaderConfiguration(data_seed=3)
    ranks = [
        prepare_data_loader(
            DataLoader(Shards(ids(SIZES)), batch_size=3, drop_last=True),
            topology=Topology(rank=rank, world_size=2),
            config=settings,
        )
        for rank in range(2)
    ]
    steps = real(steps_of(ranks))
    assert [len(step) for step in steps] == [6, 6, 6]  # the second part has ten samples


KINDS = {
    "shards": (lambda: Shards(ids(SIZES)), {}),
    "shuffled": (lambda: Shards(ids(SIZES), shuffled=True), {}),
    "index": (lambda: Shards(ids(SIZES)), {"sharding": "index"}),
    "ignored": (lambda: Shards(ids(SIZES)), {"use_stateful_dataloader": False}),
    "uneven": (lambda: Shards(ids(SIZES)), {"even_batches": False}),
    "rule": (lambda: Plain(ids(SIZES)), {"sharding": lambda dataset, num, part: Plain(dataset.shards[part::num])}),
    "workers": (lambda: Shards(ids(SIZES)), {"workers": 2}),
}


@pytest.mark.parametrize(("kind", "world"), [*((kind, world) for kind in KINDS for world in (1, 2)), ("shards", 4)])
def test_from_every_place_the_rest_follows(kind: str, world: int) -> None:
    make, settings = KINDS[kind]
    if kind == "workers" and world == 1:
        make = lambda: Shards(ids([3, 2]))  # noqa: E731
    ranks = world_of(make, world, **settings)
    for loader in ranks:
        loader.set_epoch(1)
    whole, following = steps_of(ranks), steps_of(ranks)
    last = len(whole) if kind != "uneven" else sum(all(entry[1] for entry in step) for step in whole)
    # A rank that has run out of batches is through with the epoch, so there is no state that all share.
    for place in range(0, last + 1, 1 if kind != "workers" else 4):
        taker = world_of(make, world, **settings)
        for loader in taker:
            loader.set_epoch(1)
        state = state_after(taker, place)
        resumed = world_of(make, world, **settings)
        for loader in resumed:
            loader.load_state_dict(state)
        assert steps_of(resumed) == whole[place:], place
        assert steps_of(resumed) == following, place


@pytest.mark.parametrize("kind", ["shards", "shuffled", "index"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (4, 2), (2, 4), (4, 1)])
def test_other_worlds_go_on_with_the_same_steps(kind: str, before: int, after: int) -> None:
    make, settings = KINDS[kind]
    whole = real(steps_of(world_of(make, before, batch_size=12 // before, **settings)))
    for place in range(1, len(whole) + 1):  # at its beginning an epoch is divided anew
        state = state_after(world_of(make, before, batch_size=12 // before, **settings), place)
        ranks = world_of(make, after, batch_size=12 // after, **settings)
        for loader in ranks:
            loader.load_state_dict(state)
        assert real(steps_of(ranks)) == whole[place:]
        assert sorted(each for step in real(steps_of(ranks)) for each in step) == list(range(26))


def test_a_global_batch_that_the_parts_cannot_give_is_refused() -> None:
    state = state_after(world_of(lambda: Shards(ids(SIZES)), 2, batch_size=2), 1)
    (loader,) = world_of(lambda: Shards(ids(SIZES)), 1, batch_size=3)
    loader.load_state_dict(state)
    with pytest.raises(
        ConfigError, match=r"with the stream in 2 parts, and a global batch has 3 samples.*multiple of 2"
    ):
        list(loader)


def test_nothing_is_read_again_where_the_dataset_knows_its_place(caplog: pytest.LogCaptureFixture) -> None:
    state = state_after(world_of(lambda: Shards(ids([40])), 1, batch_size=4), 7)
    dataset = Shards(ids([40]))
    (loader,) = world_of(lambda: dataset, 1, batch_size=4)
    loader.load_state_dict(state)
    assert [each for batch in loader for each in batch.tolist()] == list(range(28, 40))
    assert dataset.read == 12
    assert not caplog.records


def test_without_a_state_it_is_read_again_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    state = state_after(world_of(lambda: Plain(ids([40])), 1, batch_size=4), 7)
    (loader,) = world_of(lambda: Plain(ids([40])), 1, batch_size=4)
    for _ in range(2):
        loader.load_state_dict(state)
        assert [each for batch in loader for each in batch.tolist()] == list(range(28, 40))
    (record,) = caplog.records
    assert (
        "Going on at sample 28 of the iterable dataset of the train loader: 28 samples before were read"
        in record.getMessage()
    )


class Ticking:
    """An iterator with a state of its own."""

    def __init__(self) -> None:
        self.now = 0

    def __iter__(self) -> Ticking:
        return self

    def __next__(self) -> int:
        if self.now == 10:
            raise StopIteration
        self.now += 1
        return self.now - 1

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = state["now"]


class Clock(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return Ticking()


def test_the_state_of_an_iterator_counts() -> None:
    state = state_after(world_of(Clock, 2, sharding="index"), 2)
    (worker,) = state["places"][0]["workers"]
    assert worker == {"samples": 8, "at": 8, "ended": False, "state": {"now": 8}}
    ranks = world_of(Clock, 2)
    for loader in ranks:
        loader.load_state_dict(state)
    assert real(steps_of(ranks)) == [[8, 9]]


class Drawing(Shards):
    """Adds to each id something drawn from every default generator."""

    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            yield each, random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.parametrize("world", [1, 2])
def test_what_a_sample_draws_depends_on_its_number_only(world: int) -> None:
    def rows(ranks: list[ShardedLoader]) -> list[Any]:
        return [[tuple(each) for each in zip(*batch, strict=True)] for loader in ranks for batch in loader]

    def make() -> Any:
        return Drawing(ids(SIZES))

    whole = rows(world_of(make, 1))
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    ranks = world_of(make, world, sharding="index", batch_size=2 // world)
    taken = [iter(loader) for loader in ranks]
    for batches in taken:
        for _ in range(5):
            next(batches)
    state = ranks[0].state_dict()
    assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    (resumed,) = world_of(make, 1)
    resumed.load_state_dict(state)
    assert rows([resumed]) == whole[5:]
    assert len({each for batch in whole for row in batch for each in row[1:]}) == 3 * 26


class Batches(IterableDataset[Any]):
    """Gives batches of its own making."""

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, 25, 5):
            yield torch.arange(start, start + 5)


@pytest.mark.parametrize("kind", ["iterable", "map"])
def test_items_of_a_loader_without_batch_size_are_batches(kind: str) -> None:
    items: Any = Batches() if kind == "iterable" else list(Batches())
    for shuffle in (False, True) if kind == "map" else (None,):
        ranks = [
            prepare_data_loader(
                DataLoader(items, batch_size=None, shuffle=shuffle),
                topology=Topology(rank=rank, world_size=2),
                config=DataLoaderConfiguration(data_seed=1),
            )
            for rank in range(2)
        ]
        found = [[batch.tolist() for batch in loader] for loader in ranks]
        assert [len(each) for each in found] == [3, 3]
        firsts = [batch[0] for each in zip(*found, strict=True) for batch in each]
        assert sorted(firsts[:5]) == [0, 5, 10, 15, 20]
        assert firsts[5] == firsts[4]  # the last group has one batch: the other rank repeats it
        assert (firsts[:5] == [0, 5, 10, 15, 20]) == (not shuffle)


class Pipeline:
    """What gives batches and knows its place, without being a DataLoader."""

    def __init__(self) -> None:
        self.now = 0
        self.loaded: int | None = None

    def __iter__(self) -> Iterator[list[int]]:
        self.now, self.loaded = self.loaded or 0, None
        while self.now < 6:
            self.now += 1
            yield [self.now]

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["now"]


def test_an_iterable_of_batches_that_knows_its_place_is_a_loader() -> None:
    def prepared(rank: int) -> ShardedLoader:
        settings = DataLoaderConfiguration(data_seed=0)
        return prepare_data_loader(Pipeline(), topology=Topology(rank=rank, world_size=2), config=settings)

    assert [list(prepared(rank)) for rank in range(2)] == [[[1], [3], [5]], [[2], [4], [6]]]
    loader = prepared(1)
    batches = iter(loader)
    next(batches)
    resumed = prepared(1)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert list(resumed) == [[4], [6]]
    assert list(resumed) == [[2], [4], [6]]


class Counted(Shards):
    """Tells how many iterations of it, and of its shards, were begun and are open."""

    def __init__(self, shards: list[list[int]], iterations: Counter[str]) -> None:
        super().__init__(shards)
        self.iterations = iterations

    def shard(self, num_shards: int, index: int) -> Counted:
        return Counted(self.shards[index::num_shards], self.iterations)

    def __iter__(self) -> Iterator[int]:
        self.iterations.update(begun=1, open=1)
        try:
            yield from super().__iter__()
        finally:
            self.iterations.update(open=-1)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_an_iteration_that_is_left_is_over_at_once(world: int, place: int, stateful: bool) -> None:
    """The collector would end it in whatever thread it runs, which may be one that its end waits for."""
    iterations: Counter[str] = Counter()

    def new() -> list[ShardedLoader]:
        return world_of(lambda: Counted(ids(SIZES), iterations), world, use_stateful_dataloader=stateful)

    ranks = new()
    if place:
        state = state_after(new(), place)
        for loader in ranks:
            loader.load_state_dict(state)
    for loader in ranks:
        for _ in loader:
            assert iterations["open"] > 0
            break
        assert iterations["open"] == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("place", [0, 3])
def test_samples_that_are_read_again_for_padding_leave_nothing_open(place: int) -> None:
    iterations: Counter[str] = Counter()
    ranks = world_of(lambda: Counted(ids([9, 2, 3, 1]), iterations), 4)
    if place:
        state = state_after(world_of(lambda: Counted(ids([9, 2, 3, 1]), iterations), 4), place)
        for loader in ranks:
            loader.load_state_dict(state)
    iterations.clear()
    steps_of(ranks)
    assert iterations["open"] == 0
    assert iterations["begun"] > 4


class Breaks(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(5)
        raise OSError("no such object")


def failure(loader: ShardedLoader) -> str:
    try:
        list(loader)
    except SampleError as error:
        return str(error)
    return ""


def test_a_stream_that_fails_is_named() -> None:
    message = failure(prepare(Breaks(), 1, 2))
    assert "Sample 5 of part 0 of the train loader was read on data rank 1" in message
    assert "OSError: no such object. Mend the dataset" in message


def read_in_parts(directory: str) -> list[Any]:
    """On real ranks: each tells the others how much its part gave; the state is that of all parts."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[Any] = []
    for even in (True, False):
        loader = prepare(Shards(ids([9, 2, 3, 1])), rank, world, even_batches=even)
        for epoch in range(2):
            for batch in loader:
                info = loader.batch_info
                assert info is not None
                entry = (batch.tolist()[: info.real_rows[rank]], info.rows, info.real_rows, info.remaining)
                found.append((even, epoch, info.index, entry))
    loader = prepare(Shards(ids([9, 2, 3, 1])), rank, world)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    whole = [batch.tolist() for batch in batches]
    resumed = prepare(Shards(ids([9, 2, 3, 1])), rank, world)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == whole
    return [found, state]


def test_real_ranks_learn_what_other_parts_gave() -> None:
    (first, state), (second, other) = run_ranks(read_in_parts, 2, "")
    assert state == other
    assert [each["workers"][0]["samples"] for each in state["places"]] == [4, 3]
    simulated = {
        even: steps_of(world_of(lambda: Shards(ids([9, 2, 3, 1])), 2, even_batches=even)) for even in (True, False)
    }
    for rank, found in enumerate((first, second)):
        for even, _, index, (real_ids, rows, _, remaining) in found:
            assert simulated[even][index][rank] == (real_ids, rows[rank], remaining)
    for even in (True, False):
        for epoch in range(2):
            seen = [
                i
                for found in (first, second)
                for e, at, _, (ids_, *_) in found
                if (e, at) == (even, epoch)
                for i in ids_
            ]
            assert sorted(seen) == list(range(15))
            numbers = [[index for e, at, index, _ in found if (e, at) == (even, epoch)] for found in (first, second)]
            assert (numbers[0] == numbers[1]) == even


def read_by_node() -> list[list[int]]:
    rank = torch.distributed.get_rank()
    topology = Topology(world_size=4, local_world_size=2).at(rank)
    loader = prepare_data_loader(
        DataLoader(Shards(ids([9, 4])), batch_size=2),
        topology=topology,
        config=DataLoaderConfiguration(sharding="node"),
    )
    found = []
    for batch in loader:
        assert loader.batch_info is not None
        found.append(batch.tolist()[: loader.batch_info.real_rows[rank]])
    return found


def test_nodes_read_their_own_shards() -> None:
    ranks = run_ranks(read_by_node, 4)
    assert sorted(each for rank in ranks[:2] for batch in rank for each in batch) == list(range(9))
    assert sorted(each for rank in ranks[2:] for batch in rank for each in batch) == list(range(9, 13))
    assert len({len(rank) for rank in ranks}) == 1


def test_a_stream_that_cannot_divide_itself_has_no_nodes() -> None:
    with pytest.raises(ConfigError, match="a `Plain`, cannot divide itself into 2 parts"):
        prepare(Plain(ids(SIZES)), 0, 2, sharding="node")


def starve() -> str:
    rank = torch.distributed.get_rank()
    loader = prepare(Shards([[1, 2, 3], []]), rank, 2)
    try:
        for _ in loader:
            pass
    except ConfigError as error:
        return str(error)
    return ""


def test_a_part_without_samples_cannot_be_padded() -> None:
    assert "Part 1 of the stream gave no sample to repeat while others go on" in run_ranks(starve, 2)[1]


class Changing(Shards):
    """Gives the dictionary that it goes on changing."""

    def __init__(self, shards: list[list[int]]) -> None:
        super().__init__(shards)
        self.live: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        self.live.update(super().state_dict())
        return self.live


def test_a_state_that_the_dataset_goes_on_changing_is_kept_as_it_was() -> None:
    loader = prepare(Changing(ids([40])), 0, 1)
    states = [loader.state_dict() for _ in loader]
    rows = [state["places"][0]["workers"][0]["state"] for state in states[:-1]]
    assert [each["row"] for each in rows] == list(range(2, 40, 2))


def test_parts_that_are_given_belong_to_as_many_ranks() -> None:
    state = state_after(world_of(lambda: Plain(ids([9])), 2, sharding="given"), 2)
    (loader,) = world_of(lambda: Plain(ids([9])), 1, batch_size=4, sharding="given")
    loader.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"written by 2 data ranks, each with a part of its own.*Start as many"):
        list(loader)


def test_a_stream_with_a_length_may_be_divided_by_another_world() -> None:
    class Sized(Shards):
        def __len__(self) -> int:
            return 16

        def shard(self, num_shards: int, index: int) -> Shards:
            return Sized(self.shards[index::num_shards])

    state = state_after(world_of(lambda: Sized(ids([8, 8])), 1, batch_size=4), 1)
    ranks = world_of(lambda: Sized(ids([8, 8])), 2, batch_size=2)
    for loader in ranks:
        loader.load_state_dict(state)
    assert real(steps_of(ranks)) == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def leave_at_other_batches() -> str:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loader = prepare(Shards(ids([20, 20])), rank, world)
    for number, _ in enumerate(loader):
        if number == 3 - rank:
            break
    try:
        list(loader)
    except CollectiveError as error:
        return str(error)
    return ""


def test_loops_that_were_left_at_other_batches_are_noticed() -> None:
    messages = run_ranks(leave_at_other_batches, 2)
    assert all("of the train loader are at different places: iteration.step" in message for message in messages)


class BreaksOnce(Shards):
    def __iter__(self) -> Iterator[int]:
        for each in super().__iter__():
            if each == 27:
                raise OSError("no such object")
            yield each

    def shard(self, num_shards: int, index: int) -> Shards:
        return BreaksOnce(self.shards[index::num_shards])


def read_a_broken_part() -> str:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loader = prepare(BreaksOnce(ids([20, 20])), rank, world)
    try:
        list(loader)
    except (CollectiveError, SampleError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_part_that_fails_is_told_to_the_others() -> None:
    whole, broken = run_ranks(read_a_broken_part, 2)
    assert whole.startswith("CollectiveError: Part 1 of the train loader could not be read by its rank")
    assert broken.startswith("SampleError: Sample 7 of part 1 of the train loader was read on data rank 1")


def break_one_rank_of_a_node() -> str:
    """Both ranks of the second node read its part; only the one that does not speak for it has a broken copy."""
    rank = torch.distributed.get_rank()
    shards = ids([20, 20])
    dataset = BreaksOnce(shards) if rank == 3 else Shards(shards)
    loader = prepare_data_loader(
        DataLoader(dataset, batch_size=2),
        topology=Topology(world_size=4, local_world_size=2).at(rank),
        config=DataLoaderConfiguration(sharding="node", data_seed=0),
        name="train loader",
    )
    try:
        list(loader)
    except (CollectiveError, SampleError) as error:
        return type(error).__name__
    return ""


def test_a_rank_that_fails_beside_others_of_its_part_is_heard() -> None:
    assert run_ranks(break_one_rank_of_a_node, 4) == ["CollectiveError"] * 3 + ["SampleError"]
