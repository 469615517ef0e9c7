"""Every combination of settings: disjoint, covering, equal counts where promised, padding marked, resumed anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader
from accel_state.topology import Topology


class Rows(Dataset[int]):
    """Of no class that is known to draw nothing."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return range(self.length)[index]


class Stream(IterableDataset[int]):
    def __init__(self, ids: range, *, num_shards: int, stateful: bool) -> None:
        self.ids = ids
        self.num_shards = num_shards
        self.now = self.loaded = 0
        if stateful:
            self.state_dict = lambda: {"now": self.now}
            self.load_state_dict = lambda state: setattr(self, "loaded", state["now"])

    def shard(self, num_shards: int, index: int) -> Stream:
        stateful = hasattr(self, "state_dict")
        return Stream(self.ids[index::num_shards], num_shards=self.num_shards // num_shards, stateful=stateful)

    def __iter__(self) -> Iterator[int]:
        first, self.loaded = self.loaded, 0
        for number in range(first, len(self.ids)):
            self.now = number + 1
            yield self.ids[number]


def by_stripes(dataset: Any, num_parts: int, part: int) -> Any:
    return Subset(dataset, range(part, len(dataset), num_parts))


@dataclass(frozen=True)
class Case:
    kind: str
    length: int
    batch_size: int
    world: int
    local: int
    drop_last: bool
    config: dict[str, Any]

    def loader(self) -> DataLoader[Any]:
        common: dict[str, Any] = {"batch_size": self.batch_size, "drop_last": self.drop_last}
        if self.kind in ("stream", "stateful"):
            num_shards = 6 if self.length >= 6 else 1
            return DataLoader(
                Stream(range(self.length), num_shards=num_shards, stateful=self.kind == "stateful"), **common
            )
        if self.kind == "buckets":
            rows = list(range(self.length))
            batches = [rows[start : start + self.batch_size] for start in range(0, self.length, self.batch_size)]
            return DataLoader(Rows(self.length), batch_sampler=batches)
        if self.kind == "subset":
            return DataLoader(Rows(self.length), sampler=SubsetRandomSampler(range(self.length)), **common)
        data: Any = range(self.length) if self.kind == "plain" else Rows(self.length)
        return DataLoader(data, shuffle=self.kind != "sequential", **common)

    def ranks(self) -> list[ShardedLoader]:
        config = DataLoaderConfiguration(**self.config)
        first = Topology(world_size=self.world, local_world_size=self.local)
        return [
            prepare_data_loader(self.loader(), topology=first.at(rank), config=config) for rank in range(self.world)
        ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["plain", "shuffled", "sequential", "subset", "buckets", "stream", "stateful"]))
    world, batch_size = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    local = draw(st.sampled_from([each for each in (1, 2, 3) if each <= world]))
    split = draw(st.booleans())
    sharding: list[Any] = ["auto", "index"]
    length = draw(st.integers(1, 50))
    if kind in ("plain", "shuffled", "sequential") and length >= world:
        sharding += ["node", by_stripes]
    config = {
        "split_batches": split,
        "even_batches": draw(st.booleans()),
        "use_seedable_sampler": draw(st.booleans()),
        "use_stateful_dataloader": draw(st.booleans()),
        "data_seed": draw(st.integers(0, 9)),
        "sharding": draw(st.sampled_from(sharding)),
    }
    if split and kind != "buckets":
        batch_size *= world
    return Case(kind, length, batch_size, world, local, draw(st.booleans()) and kind != "buckets", config)


Epoch = list[tuple[list[list[int]], tuple[Any, ...]]]


def read(ranks: list[ShardedLoader]) -> Epoch:
    """Of each global batch the rows of each rank and what is said of them."""
    steps: dict[int, Any] = {}
    for rank, loader in enumerate(ranks):
        for batch in loader:
            info = loader.batch_info
            assert info is not None
            rows, said = steps.setdefault(info.index, ([[] for _ in ranks], info))
            assert tuple(said) == tuple(info)
            assert len(batch) == info.rows[rank]
            rows[rank] = batch.tolist()
    assert sorted(steps) == list(range(min(steps, default=0), min(steps, default=0) + len(steps)))
    return [(steps[index][0], tuple(steps[index][1])) for index in sorted(steps)]


def real(epoch: Epoch) -> list[int]:
    return [each for rows, info in epoch for rank, count in enumerate(info[3]) for each in rows[rank][:count]]


@settings(deadline=None, max_examples=250)
@given(cases(), st.data())
def test_any_combination_of_settings(case: Case, data: st.DataObject) -> None:
    ranks = case.ranks()
    first, second = read(ranks), read(ranks)
    for epoch in (first, second):
        seen = real(epoch)
        assert len(seen) == len(set(seen))
        if not case.drop_last:
            assert sorted(seen) == list(range(case.length))
        for rows, (_, _, counts, reals, _, may_pad) in epoch:
            assert [len(each) for each in rows] == list(counts)
            assert may_pad or counts == reals
            if case.config["even_batches"] and case.kind != "buckets":
                assert len(set(counts)) == 1
        if epoch:
            assert epoch[-1][1][4] == 0
            assert all(info[4] != 0 for _, info in epoch[:-1])
        if case.drop_last:
            assert all(info[2] == info[3] == (info[2][0],) * case.world for _, info in epoch)
        if case.config["even_batches"]:
            assert all(all(rows) for rows, _ in epoch)
    shared = sum(all(rows) for rows, _ in first)  # up to where every rank still takes part
    place = data.draw(st.integers(0, shared))
    states = []
    for loader in case.ranks():
        batches = iter(loader)
        for _ in range(place):
            next(batches)
        states.append(json.dumps(loader.state_dict()))
    assert len(set(states)) == 1
    resumed = case.ranks()
    for loader in resumed:
        loader.load_state_dict(json.loads(states[0]))
    assert read(resumed) == first[place:]
    assert read(resumed) == second


def test_the_order_is_that_of_torch_for_one_process_without_shuffling() -> None:
    (loader,) = Case("sequential", 10, 4, 1, 1, False, {"data_seed": 0}).ranks()
    plain = DataLoader(Rows(10), batch_size=4)
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in plain]
    assert isinstance(next(iter(loader)), torch.Tensor)
