"""Hugging Face ``datasets`` from local Parquet files, by index or streamed: every row once, the rest from anywhere."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader
from accel_state import Process
from accel_state.errors import ConfigError
from accel_state.testing import RankError, run_ranks
from accel_state.topology import Topology

ROWS, FILES = 103, 4
GLOBAL_BATCH = 12


@pytest.fixture(autouse=True)
def no_sleep_at_the_end_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines of ``datasets`` that read in threads sleep for 5 s at their end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four files of 26, 26, 26 and 25 rows."""
    folder = tmp_path_factory.mktemp("parquet")
    datasets.disable_progress_bars()
    rows = Dataset.from_dict(
        {"id": list(range(ROWS)), "text": [f"row {number} " * (number % 7) for number in range(ROWS)]}
    )
    paths = [str(folder / f"{number}.parquet") for number in range(FILES)]
    for number, path in enumerate(paths):
        rows.shard(FILES, number, contiguous=True).to_parquet(path)
    return paths


def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([int(row["id"]) for row in rows])


def prepare(
    dataset: Any, rank: int, world: int, *, workers: int = 0, shuffle: bool | None = None, **settings: Any
) -> ShardedLoader:
    """A loader of a simulated rank, or of this one where the world is real."""
    topology = Process.current().topology if Process.is_open() else Topology(rank=rank, world_size=world)
    loader = DataLoader(
        dataset,
        batch_size=GLOBAL_BATCH // world,
        num_workers=workers,
        shuffle=shuffle,
        collate_fn=collate,
        multiprocessing_context="fork" if workers else None,
    )
    return prepare_data_loader(
        loader, topology=topology, config=DataLoaderConfiguration(data_seed=5, **settings), name="train loader"
    )


def real_rows(loader: ShardedLoader, rank: int) -> Iterator[tuple[int, list[int]]]:
    """Number of each step, and the ids in it that are no padding."""
    for batch in loader:
        info = loader.batch_info
        assert info is not None
        yield info.index, batch.tolist()[: info.real_rows[rank]]


def steps_of(ranks: list[ShardedLoader]) -> dict[int, list[int]]:
    """Of every step the ids of all ranks, in order of rank."""
    steps: dict[int, list[int]] = {}
    for rank, loader in enumerate(ranks):
        for index, rows in real_rows(loader, rank):
            steps.setdefault(index, []).extend(rows)
    return dict(sorted(steps.items()))


def state_after(ranks: list[ShardedLoader], num_steps: int) -> str:
    """The state in the body of a step, as text; all ranks agree on it."""
    states = set()
    for loader in ranks:
        batches = iter(loader)
        for _ in range(num_steps):
            next(batches, None)
        states.add(json.dumps(loader.state_dict()))
        batches.close()  # type: ignore[attr-defined]
    (state,) = states
    return state


def resumed(ranks: list[ShardedLoader], state: str) -> list[ShardedLoader]:
    for loader in ranks:
        loader.load_state_dict(json.loads(state))
    return ranks


def flat(steps: dict[int, list[int]]) -> list[int]:
    return [each for rows in steps.values() for each in rows]


# Map-style


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_map_style_dataset_gives_every_row_once(files: list[str], world: int, workers: int, tmp_path: Path) -> None:
    if workers and world > 2:
        pytest.skip("worker processes for these are enough")
    dataset = Dataset.from_parquet(files, cache_dir=str(tmp_path)).with_format("torch")
    ranks = [prepare(dataset, rank, world, workers=workers, shuffle=True) for rank in range(world)]
    epochs = [steps_of(ranks) for _ in range(2)]
    for steps in epochs:
        assert sorted(flat(steps)) == list(range(ROWS))
    assert flat(epochs[0]) != flat(epochs[1])


def test_what_a_transform_draws_depends_on_the_row_alone(files: list[str], tmp_path: Path) -> None:
    def drawn(world: int, workers: int) -> list[dict[int, int]]:
        dataset = Dataset.from_parquet(files, cache_dir=str(tmp_path))
        # The draw is put above the id: one number then holds both.
        dataset.set_transform(lambda rows: {"id": [each + 1000 * random.randrange(1000) for each in rows["id"]]})
        ranks = [prepare(dataset, rank, world, workers=workers, shuffle=True) for rank in range(world)]
        return [{each % 1000: each // 1000 for each in flat(steps_of(ranks))} for _ in range(2)]

    expected = drawn(1, 0)
    assert [sorted(epoch) for epoch in expected] == [list(range(ROWS))] * 2
    assert len(set(expected[0].values())) > ROWS // 2
    assert expected[0] != expected[1]
    for world, workers in [(2, 0), (3, 0), (1, 2), (2, 2)]:
        assert drawn(world, workers) == expected


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2), (2, 3)])
def test_a_map_style_dataset_resumes_without_fetching_anything_twice(
    files: list[str], tmp_path: Path, before: int, after: int
) -> None:
    dataset = Dataset.from_parquet(files, cache_dir=str(tmp_path))
    fetched: list[int] = []

    def note(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        fetched.extend(rows["id"])
        return rows

    dataset.set_transform(note)

    def world_of(size: int) -> list[ShardedLoader]:
        return [prepare(dataset, rank, size, shuffle=True, even_batches=False) for rank in range(size)]

    expected = steps_of(world_of(before))
    for stop in (1, 4, len(expected) - 1, len(expected)):
        state = state_after(world_of(before), stop)
        fetched.clear()
        rest = steps_of(resumed(world_of(after), state))
        assert rest == {index: rows for index, rows in expected.items() if index >= stop}
        assert Counter(fetched) == Counter(flat(rest))


# Streaming


def streamed(files: list[str]) -> IterableDataset:
    return IterableDataset.from_parquet(files)


def with_twice(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"twice": [2 * each for each in rows["id"]]}


def above(files: list[str]) -> IterableDataset:
    return streamed(files).map(lambda row: {"id": row["id"] + 1000})


EVERY = list(range(ROWS))
PIPELINES: dict[str, tuple[Callable[[list[str]], Any], list[int]]] = {
    "plain": (streamed, EVERY),
    "torch format": (lambda files: streamed(files).select_columns(["id"]).with_format("torch"), EVERY),
    "map": (lambda files: streamed(files).map(lambda row: {"twice": 2 * row["id"]}), EVERY),
    "batched map": (lambda files: streamed(files).map(with_twice, batched=True, batch_size=8), EVERY),
    "filter": (
        lambda files: streamed(files).filter(lambda row: row["id"] % 3 > 0),
        [each for each in EVERY if each % 3],
    ),
    "shuffle": (lambda files: streamed(files).shuffle(seed=3, buffer_size=16), EVERY),
    "shuffle, batched map": (
        lambda files: streamed(files).shuffle(seed=3, buffer_size=16).map(with_twice, batched=True, batch_size=8),
        EVERY,
    ),
    "interleave": (
        lambda files: interleave_datasets(
            [streamed(files), above(files)], stopping_strategy="all_exhausted_without_replacement"
        ),
        [*EVERY, *(each + 1000 for each in EVERY)],
    ),
    "concatenate": (
        lambda files: concatenate_datasets([streamed(files), above(files)]),
        [*EVERY, *(each + 1000 for each in EVERY)],
    ),
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_stream_gives_every_row_once(files: list[str], pipeline: str, world: int) -> None:
    make, expected = PIPELINES[pipeline]
    ranks = [prepare(make(files), rank, world) for rank in range(world)]
    for _ in range(3):  # the order of files changes from the third epoch on
        assert sorted(flat(steps_of(ranks))) == expected


@pytest.mark.parametrize("pipeline", ["plain", "batched map", "shuffle", "concatenate"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_divided_among_workers(files: list[str], pipeline: str, world: int) -> None:
    make, expected = PIPELINES[pipeline]
    ranks = [prepare(make(files), rank, world, workers=2) for rank in range(world)]
    whole = steps_of(ranks)
    assert sorted(flat(whole)) == expected
    for stop in (1, 4, len(whole) - 1, len(whole)):
        state = state_after([prepare(make(files), rank, world, workers=2) for rank in range(world)], stop)
        rest = steps_of(resumed([prepare(make(files), rank, world, workers=2) for rank in range(world)], state))
        assert rest == {index: rows for index, rows in whole.items() if index >= stop}


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_stream_resumes(files: list[str], pipeline: str, world: int, epoch: int) -> None:
    make, _ = PIPELINES[pipeline]

    def new() -> list[ShardedLoader]:
        ranks = [prepare(make(files), rank, world) for rank in range(world)]
        for loader in ranks:
            loader.set_epoch(epoch)
        return ranks

    reference = new()
    whole, following = steps_of(reference), steps_of(reference)
    for stop in (1, 3, len(whole) - 1, len(whole)):
        ranks = resumed(new(), state_after(new(), stop))
        assert steps_of(ranks) == {index: rows for index, rows in whole.items() if index >= stop}
        assert steps_of(ranks) == following  # the state that was loaded does not come back


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (4, 2), (3, 4)])
@pytest.mark.parametrize("pipeline", ["plain", "batched map", "shuffle"])
def test_a_stream_resumes_in_another_world(files: list[str], pipeline: str, before: int, after: int) -> None:
    make, expected = PIPELINES[pipeline]
    whole = steps_of([prepare(make(files), rank, before) for rank in range(before)])
    for stop in (1, 4, len(whole) - 1, len(whole)):
        state = state_after([prepare(make(files), rank, before) for rank in range(before)], stop)
        ranks = resumed([prepare(make(files), rank, after) for rank in range(after)], state)
        seen = [each for index, rows in whole.items() if index < stop for each in rows]
        assert sorted(seen + flat(steps_of(ranks))) == expected
        assert sorted(flat(steps_of(ranks))) == expected


def test_an_epoch_that_was_resumed_can_be_read_again_as_a_whole(files: list[str]) -> None:
    """The dataset itself would begin where the state that was loaded into it stands."""
    state = state_after([prepare(streamed(files), 0, 1)], 5)
    (loader,) = resumed([prepare(streamed(files), 0, 1)], state)
    assert flat(steps_of([loader])) == list(range(5 * GLOBAL_BATCH, ROWS))
    loader.set_epoch(0)
    assert flat(steps_of([loader])) == EVERY


def test_what_was_seen_is_not_mapped_again(files: list[str]) -> None:
    mapped: list[int] = []

    def note(row: dict[str, Any]) -> dict[str, Any]:
        mapped.append(row["id"])
        return row

    state = state_after([prepare(streamed(files).map(note), 0, 1)], 5)
    mapped.clear()
    rest = steps_of(resumed([prepare(streamed(files).map(note), 0, 1)], state))
    assert mapped == flat(rest) == list(range(5 * GLOBAL_BATCH, ROWS))


@pytest.mark.parametrize("pipeline", ["plain", "shuffle"])
def test_only_a_shuffle_buffer_is_read_again(files: list[str], pipeline: str, caplog: pytest.LogCaptureFixture) -> None:
    make, _ = PIPELINES[pipeline]
    state = state_after([prepare(make(files), 0, 1)], 4)
    with caplog.at_level(logging.WARNING, logger="accel_data"):
        steps_of(resumed([prepare(make(files), 0, 1)], state))
    assert ("read again" in caplog.text) == (pipeline == "shuffle")


def test_the_state_of_a_stream_is_small(files: list[str]) -> None:
    make, _ = PIPELINES["batched map"]
    assert len(state_after([prepare(make(files), rank, 4) for rank in range(4)], 4)) < 8192


def test_a_dataset_that_is_split_by_node_already(files: list[str]) -> None:
    def split(rank: int) -> Any:
        return split_dataset_by_node(streamed(files), rank=rank, world_size=2)

    with pytest.raises(
        ConfigError, match=r"dataset that was split by node.* one of 2 parts already.*sharding=\"given\""
    ):
        prepare(split(0), 0, 2)
    with pytest.raises(ConfigError, match="is divided into 2 parts"):
        prepare(split(0), 0, 3, sharding="given")


# Real ranks


def seen_by_rank(files: list[str], pipelines: list[str], settings: dict[str, Any], stop: int) -> Any:
    """Of each pipeline, this rank's real rows by step: of an epoch, and of its rest from `stop` on, read anew."""
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # this process is a rank's own
    return [whole_and_rest(files, PIPELINES[each][0], settings, stop) for each in pipelines]


def whole_and_rest(
    files: list[str], make: Callable[[list[str]], Any], settings: dict[str, Any], stop: int
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    place = Process.current().topology

    def new() -> ShardedLoader:
        dataset = make(files)
        if settings.get("sharding") == "given":
            dataset = split_dataset_by_node(dataset, rank=place.rank, world_size=place.world_size)
        return prepare(dataset, place.rank, place.world_size, **settings)

    whole = dict(real_rows(new(), place.rank))
    interrupted = new()
    batches = iter(interrupted)
    for _ in range(stop):
        next(batches)
    state = json.dumps(interrupted.state_dict())
    batches.close()  # type: ignore[attr-defined]
    fresh = new()
    fresh.load_state_dict(json.loads(state))
    return whole, dict(real_rows(fresh, place.rank))


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {}),
        (3, {}),
        (4, {}),
        (2, {"sharding": "index"}),
        (2, {"sharding": "given"}),
        (3, {"sharding": "given"}),
        (2, {"dispatch_batches": True}),
        (3, {"dispatch_batches": True}),
        (2, {"workers": 2}),
        (3, {"workers": 2}),
    ],
    ids=str,
)
def test_real_ranks(files: list[str], world: int, settings: dict[str, Any]) -> None:
    pipelines = ["batched map", "shuffle"]
    answers = run_ranks(seen_by_rank, world, files, pipelines, settings, 3)
    for number, pipeline in enumerate(pipelines):
        rows = [each for answer in answers for step in answer[number][0].values() for each in step]
        assert sorted(rows) == PIPELINES[pipeline][1]
        for answer in answers:
            whole, rest = answer[number]
            assert rest == {index: step for index, step in whole.items() if index >= 3}


def shuffled_without_a_seed(files: list[str]) -> list[int]:
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    place = Process.current().topology
    loader = prepare(streamed(files).shuffle(buffer_size=8), place.rank, place.world_size)
    return [each for _, rows in real_rows(loader, place.rank) for each in rows]


@pytest.mark.parametrize("world", [2, 3])  # divided by files, and by rows
def test_ranks_that_would_shuffle_each_in_its_own_way(files: list[str], world: int) -> None:
    with pytest.raises(RankError, match=r"shuffled without a seed.*Give the seed"):
        run_ranks(shuffled_without_a_seed, world, files)
