"""Loaders that leave the first batches of an epoch out, for scripts that count by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler

from accel_data.configuration import DataLoaderConfiguration
from accel_data.convert import AnyLoader, prepare_data_loader, rebuilt
from accel_data.loader import check_count
from accel_state.topology import Topology

__all__ = ["skip_first_batches"]


def skip_first_batches(loader: AnyLoader, num_batches: int = 0) -> AnyLoader:
    """A loader whose next iteration leaves the first batches of the epoch out, without fetching them.

    A `ShardedLoader` gives one that shares its place (see `ShardedLoader.skip_first`). A plain DataLoader gives
    a plain one with the same sampler; over an iterable dataset, one that reads up to there without collating.

    Raises:
        ConfigError: if `num_batches` is no count, or `loader` is no DataLoader.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        check_count(num_batches, "data loader")
        indices = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        skipping = _SkipFirst(indices, num_batches)
        plain = DataLoaderConfiguration()
        if loader.batch_sampler is None:
            return rebuilt(loader, None, plain, sampler=skipping, batch_size=None, generator=loader.generator)
        return rebuilt(loader, None, plain, batch_sampler=skipping, generator=loader.generator)
    return prepare_data_loader(loader, topology=Topology()).skip_first(num_batches)


class _SkipFirst(Sampler[Any]):
    """What a sampler gives, but for the first items of the first iteration."""

    def __init__(self, sampler: Any, num_items: int) -> None:
        self._sampler = sampler
        self._num_items = num_items

    def __iter__(self) -> Iterator[Any]:
        # A generator: a loader with workers makes an iterator that it does not use before the one that it does.
        skip, self._num_items = self._num_items, 0
        yield from islice(iter(self._sampler), skip, None)

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._num_items)
