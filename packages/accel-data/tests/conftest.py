"""Shared by the tests of accel-data: the leak guard, simulated worlds, recording datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accel_data import DataLoaderConfiguration, ShardedLoader, prepare_data_loader
from accel_state.testing import leak_guard
from accel_state.topology import Topology

guard = pytest.fixture(autouse=True)(leak_guard)

Step = list[tuple[list[int], int]]
"""Of one global batch: each rank's ids and how many of them are real, in order of rank."""


class Recording(Dataset[int]):
    """Gives its indices and notes which were asked for (in this process)."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(index)
        self.asked.append(index)
        return index


class Counting(IterableDataset[int]):
    """The integers below a number; with several workers each gives every n-th."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(first, self.length, step))


class World:
    """Loaders of all data ranks of a world, simulated in one process."""

    def __init__(self, make: Callable[[], DataLoader[Any]], size: int, **config: Any) -> None:
        config = {"data_seed": 7, **config}
        self.loaders: list[ShardedLoader] = [
            prepare_data_loader(
                make(),
                topology=Topology(rank=rank, world_size=size),
                config=DataLoaderConfiguration(**config),
            )
            for rank in range(size)
        ]

    def epoch(self, limit: int | None = None) -> list[Step]:
        """The global batches of one iteration, up to `limit` of them; a rank without a batch in one has ``[]``."""
        steps: dict[int, Step] = {}
        for rank, loader in enumerate(self.loaders):
            for num, batch in enumerate(loader if limit != 0 else (), 1):
                info = loader.batch_info
                assert info is not None
                step = steps.setdefault(info.index, [([], 0) for _ in self.loaders])
                assert len(batch) == info.rows[rank]
                step[rank] = (batch.tolist(), info.real_rows[rank])
                if num == limit:
                    break
        return [steps[index] for index in sorted(steps)]

    def state_after(self, num_batches: int, *, epoch: int) -> dict[str, Any]:
        """The state in the body of batch number `num_batches` of an epoch, the same on all ranks."""
        states = []
        for loader in self.loaders:
            loader.set_epoch(epoch)
            if num_batches == 0:
                states.append(loader.state_dict())
                continue
            for number, _ in enumerate(loader, 1):
                if number == num_batches:
                    states.append(loader.state_dict())
                    break
        assert all(state == states[0] for state in states)
        return states[0]

    def load(self, state: dict[str, Any]) -> None:
        for loader in self.loaders:
            loader.load_state_dict(state)


def real(steps: list[Step]) -> list[int]:
    """Real ids in order: of each step, each rank's first ones."""
    return [each for step in steps for ids, num in step for each in ids[:num]]


@pytest.fixture
def world() -> type[World]:
    return World


@pytest.fixture
def real_ids() -> Callable[[list[Step]], list[int]]:
    return real


@pytest.fixture
def recording() -> type[Recording]:
    return Recording


@pytest.fixture
def counting() -> type[Counting]:
    return Counting
