"""Real processes: what ranks must agree on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from accel_data import prepare_data_loader
from accel_state.process import Process
from accel_state.testing import rank_environment, run_ranks
from accel_state.topology import Topology

DATA: Any = range(23)


class Unseedable:
    """Draws from the operating system: every rank would have an order of its own."""

    def __len__(self) -> int:
        return 23

    def __iter__(self) -> Iterator[int]:
        return iter(random.SystemRandom().sample(range(23), 23))


class UnseedableBatches(Unseedable):
    def __iter__(self) -> Any:
        return ([each] for each in super().__iter__())


def read(loader: DataLoader[Any], topology: Topology) -> list[list[tuple[int, list[int]]]]:
    """Of three epochs: this rank's real ids of each step."""
    torch.manual_seed(topology.rank)  # ranks draw different seeds: that of rank 0 must count
    sharded = prepare_data_loader(loader, topology=topology)
    epochs = []
    for _ in range(3):
        steps = []
        for batch in sharded:
            info = sharded.batch_info
            assert info is not None
            steps.append((info.index, batch.tolist()[: info.real_rows[topology.data_rank]]))
        epochs.append(steps)
    return epochs


def make(kind: str) -> DataLoader[Any]:
    if kind == "sampler":
        return DataLoader(DATA, batch_size=3, sampler=Unseedable())
    if kind == "batch_sampler":
        return DataLoader(DATA, batch_sampler=UnseedableBatches())
    return DataLoader(DATA, batch_size=3, shuffle=True)


def in_a_process(kind: str) -> Any:
    return read(make(kind), Process.current().topology)


def with_a_group_only(kind: str) -> Any:
    """A script that has started torch.distributed itself and opens no `Process`."""
    place = rank_environment()
    host_store = dist.TCPStore(place.master_addr or "", place.master_port or 0, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=host_store, rank=place.rank, world_size=place.world_size)
    try:
        return read(make(kind), Topology(rank=place.rank, world_size=place.world_size))
    finally:
        dist.destroy_process_group()


def check(ranks: list[Any]) -> None:
    for epochs in zip(*ranks, strict=True):
        ids = [each for steps in epochs for _, ids in steps for each in ids]
        assert sorted(ids) == list(range(23))
    assert ranks[0][0] != ranks[0][1]


def test_ranks_agree_on_the_order() -> None:
    for kind in ("shuffled", "sampler", "batch_sampler"):
        check(run_ranks(in_a_process, 2, kind))


def test_ranks_agree_without_an_open_process() -> None:
    for kind in ("shuffled", "sampler"):
        check(run_ranks(with_a_group_only, 3, kind, open_process=False))


def test_the_tests_see_disagreement() -> None:
    """Guards the two above: the samplers do differ between processes."""
    orders = run_ranks(unshared_order, 2)
    assert orders[0] != orders[1]


def unshared_order() -> list[int]:
    return list(Unseedable())
