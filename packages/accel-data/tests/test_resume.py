"""From every place of an epoch, on the same and on other worlds: the ids of the uninterrupted run."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from accel_state.errors import ConfigError

Make = Callable[[], DataLoader[Any]]
LENGTH = 23


class Shuffled(Sampler[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(self.length), self.length))


class ShuffledStream(IterableDataset[int]):
    """Draws its order while it is read, from a default generator."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(LENGTH))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


def makers(counting: Any) -> dict[str, Make]:
    workers = {"num_workers": 2, "prefetch_factor": 3}
    data: Any = range(LENGTH)
    pairs = [[each, each + 1] for each in range(0, LENGTH - 1, 2)]
    return {
        "sequential": lambda: DataLoader(data, batch_size=2),
        "shuffled": lambda: DataLoader(data, batch_size=2, shuffle=True),
        "drop_last": lambda: DataLoader(data, batch_size=3, shuffle=True, drop_last=True),
        "sampler": lambda: DataLoader(data, batch_size=2, sampler=Shuffled(LENGTH)),
        "batch_sampler": lambda: DataLoader(data, batch_sampler=pairs),
        "iterable": lambda: DataLoader(counting(LENGTH), batch_size=2),
        "shuffled_iterable": lambda: DataLoader(ShuffledStream(), batch_size=2),
        "workers": lambda: DataLoader(data, batch_size=4, shuffle=True, **workers),  # type: ignore[arg-type]
        "persistent": lambda: DataLoader(data, batch_size=4, shuffle=True, persistent_workers=True, **workers),  # type: ignore[arg-type]
        "iterable_one_worker": lambda: DataLoader(
            counting(LENGTH), batch_size=2, num_workers=1, persistent_workers=True
        ),
        "iterable_workers": lambda: DataLoader(counting(LENGTH), batch_size=2, **workers),  # type: ignore[arg-type]
        "iterable_persistent": lambda: DataLoader(
            counting(LENGTH),
            batch_size=2,
            persistent_workers=True,
            **workers,  # type: ignore[arg-type]
        ),
    }


SLOW = {"iterable_one_worker", "workers", "persistent", "iterable_workers", "iterable_persistent"}
KINDS = list(makers(None))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_every_place_gives_the_rest(kind: str, size: int, world: Any, counting: Any) -> None:
    if kind in SLOW and size == 2:
        pytest.skip("worker processes for one rank are enough")
    make = makers(counting)[kind]
    whole = world(make, size)
    epochs = [whole.epoch() for _ in range(3)]
    taker = world(make, size)
    resumed = world(make, size)  # persistent workers live through all of it
    for place in range(len(epochs[1]) + 1):
        state = json.loads(json.dumps(taker.state_after(place, epoch=1)))
        resumed.load(state)
        assert [loader.epoch for loader in resumed.loaders] == [1] * size
        assert resumed.epoch() == epochs[1][place:], place
        assert resumed.epoch() == epochs[2], place


def test_the_state_is_that_of_what_was_handed_out_not_of_what_was_prefetched(world: Any) -> None:
    ranks = world(lambda: DataLoader(range(40), batch_size=2, num_workers=1, prefetch_factor=8), 1)  # type: ignore[arg-type]
    for number, _ in enumerate(ranks.loaders[0], 1):
        state = ranks.loaders[0].state_dict()
        assert (state["batches"], state["cursor"]) == (number, 2 * number)


@pytest.mark.parametrize("kind", ["sequential", "shuffled", "sampler", "iterable", "shuffled_iterable"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (4, 2), (3, 6), (6, 1)])
def test_another_world_goes_on_with_the_same_global_batches(
    kind: str, before: int, after: int, world: Any, counting: Any, real_ids: Any
) -> None:
    data: Any = range(50)

    def make_for(size: int) -> Make:
        batch_size = 12 // size
        return {
            "sequential": lambda: DataLoader(data, batch_size=batch_size),
            "shuffled": lambda: DataLoader(data, batch_size=batch_size, shuffle=True),
            "sampler": lambda: DataLoader(data, batch_size=batch_size, sampler=Shuffled(50)),
            "iterable": lambda: DataLoader(counting(50), batch_size=batch_size),
            "shuffled_iterable": lambda: DataLoader(ShuffledStream(), batch_size=batch_size),
        }[kind]

    def by_step(steps: list[Any]) -> list[list[int]]:
        return [real_ids([step]) for step in steps]

    uninterrupted = by_step(world(make_for(before), before).epoch())
    for place in range(len(uninterrupted) + 1):
        state = world(make_for(before), before).state_after(place, epoch=0)
        other = world(make_for(after), after)
        other.load(state)
        assert by_step(other.epoch()) == uninterrupted[place:]


@pytest.mark.parametrize("kind", ["shuffled", "iterable"])
def test_another_batch_size_cuts_the_rest_anew(kind: str, world: Any, counting: Any, real_ids: Any) -> None:
    data: Any = range(50) if kind == "shuffled" else counting(50)
    shuffle = kind == "shuffled" or None
    whole = real_ids(world(lambda: DataLoader(data, batch_size=7, shuffle=shuffle), 2).epoch())
    state = world(lambda: DataLoader(data, batch_size=5, shuffle=shuffle), 3).state_after(2, epoch=0)
    assert state["cursor"] == 30
    ranks = world(lambda: DataLoader(data, batch_size=7, shuffle=shuffle), 2)
    ranks.load(state)
    rest = ranks.epoch()
    assert real_ids(rest) == whole[30:]
    assert [len(ids) for ids, _ in rest[0]] == [7, 7]


def test_the_seed_comes_with_the_state(world: Any) -> None:
    make: Make = lambda: DataLoader(range(30), batch_size=2, shuffle=True)  # type: ignore[arg-type]  # noqa: E731
    first, second = world(make, 2), world(make, 2, data_seed=99)
    expected = first.epoch()
    assert second.epoch() != expected
    second.load(world(make, 2).state_after(3, epoch=0))
    assert second.epoch() == expected[3:]


def test_samples_that_are_skipped_are_not_fetched(world: Any, recording: Any) -> None:
    for shuffle in (False, True):
        dataset = recording(40)
        make: Make = lambda: DataLoader(dataset, batch_size=2, shuffle=shuffle)  # noqa: B023, E731
        state = world(make, 2).state_after(6, epoch=0)
        dataset.asked.clear()
        resumed = world(make, 2)
        resumed.load(state)
        rest = resumed.epoch()
        assert len(dataset.asked) == 16
        assert sorted(dataset.asked) == sorted(each for step in rest for ids, _ in step for each in ids)


def test_a_late_place_of_a_huge_dataset_costs_nothing(world: Any) -> None:
    import time
    import tracemalloc

    class Huge(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 2 * 10**8

        def __getitem__(self, index: int) -> int:
            return index

    loader = world(lambda: DataLoader(Huge(), batch_size=4, shuffle=True), 1).loaders[0]
    state = {**loader.state_dict(), "cursor": 10**8, "batches": 10**8 // 4}
    tracemalloc.start()
    began = time.perf_counter()
    loader.load_state_dict(state)
    next(iter(loader))
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 0.5  # 3 ms on an idle machine
    assert peak < 1_000_000


def test_an_iterable_says_once_that_it_reads_again(world: Any, counting: Any, caplog: pytest.LogCaptureFixture) -> None:
    ranks = world(lambda: DataLoader(counting(40), batch_size=2), 2)
    state = ranks.state_after(5, epoch=0)
    collated: list[int] = []
    other = world(
        lambda: DataLoader(
            counting(40), batch_size=2, collate_fn=lambda rows: collated.append(1) or torch.tensor(rows)
        ),
        2,
    )
    with caplog.at_level(logging.WARNING, logger="accel_data"):
        for _ in range(2):
            other.load(state)
            other.epoch()
    assert len(collated) == 2 * 2 * 5
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "at sample 20 of the iterable dataset" in messages[0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_read_again_without_collating(num_workers: int, world: Any, counting: Any) -> None:
    calls = torch.zeros(64, dtype=torch.int64).share_memory_()

    def collate(rows: list[int]) -> torch.Tensor:
        calls[rows[0]] += 1
        return torch.tensor(rows)

    def make() -> DataLoader[Any]:
        return DataLoader(counting(40), batch_size=2, num_workers=num_workers, collate_fn=collate)

    state = world(make, 1).state_after(7, epoch=0)
    calls.zero_()
    resumed = world(make, 1)
    resumed.load(state)
    assert len(resumed.epoch()) == 13
    assert calls.sum() == 13


class Unrepeatable(Shuffled):
    """Draws from a generator that nobody can seed."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.SystemRandom().sample(range(self.length), self.length))


@pytest.mark.parametrize("batched", [False, True])
def test_a_sampler_that_draws_another_order_is_refused_in_the_middle(batched: bool, world: Any) -> None:
    class Batches(Unrepeatable):
        def __iter__(self) -> Any:
            return ([each] for each in super().__iter__())

    make: Make = lambda: (  # noqa: E731
        DataLoader(range(60), batch_sampler=Batches(60))  # type: ignore[arg-type]
        if batched
        else DataLoader(range(60), batch_size=2, sampler=Unrepeatable(60))  # type: ignore[arg-type]
    )
    state = world(make, 1).state_after(3, epoch=0)
    other = world(make, 1)
    other.load(state)
    with pytest.raises(ConfigError, match=r"order of epoch 0 again.*gave another one than before"):
        other.epoch()
    assert other.loaders[0].state_dict() == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, and this accel-data reads version 1"),
        ({"version": None}, "has version None"),
        ({"cursor": -1}, "has `cursor=-1`, which is not a count"),
        ({"epoch": "1"}, "has `epoch='1'`"),
        ({"seed": None}, "has `seed=None`"),
        ({"seed": 1 << 63}, "has `seed=9223372036854775808`, which is not a count"),
        ({"batches": True}, "has `batches=True`"),
        ({"order": "permutation"}, "written for a shuffled loader, and it now has a loader in sequential order"),
        ({"order": "of the day"}, "loader of kind 'of the day'"),
        ({"length": 24}, "written for an epoch of 24 samples, and there are 23 now"),
        ({"cursor": 24}, "stands at 24, and an epoch ends at 23"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: dict[str, Any], message: str, world: Any, counting: Any) -> None:
    loader = world(makers(counting)["sequential"], 1).loaders[0]
    state = loader.state_dict()
    with pytest.raises(ConfigError, match=message):
        loader.load_state_dict({**state, **change})
    assert loader.state_dict() == state


def test_a_stream_divided_among_other_workers_is_refused(world: Any, counting: Any) -> None:
    def loader(num_workers: int, batch_size: int) -> Any:
        return world(lambda: DataLoader(counting(LENGTH), batch_size=batch_size, num_workers=num_workers), 1).loaders[0]

    state = world(lambda: DataLoader(counting(LENGTH), batch_size=2, num_workers=2), 1).state_after(3, epoch=0)
    with pytest.raises(ConfigError, match=r"with 2 worker\(s\) reading the stream, and there are 1 now.*0 and 1 are"):
        loader(0, 2).load_state_dict(state)
    loader(2, 3).load_state_dict(state)
    loader(1, 3).load_state_dict(world(lambda: DataLoader(counting(LENGTH), batch_size=2), 1).state_after(3, epoch=0))
