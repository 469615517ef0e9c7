"""From the user's ``DataLoader`` to a sharded one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from accel_data.loader import ShardedLoader
from accel_data.randomness import draw_seed
from accel_data.sampler import ShardedBatchSampler
from accel_data.source import BatchSource, SampleSource, Source, StreamSource
from accel_data.stream import ShardedStream, StreamWorkerInit, hand_over
from accel_data.user_sampler import agree, recognise, refuse_sharded
from accel_state.errors import ConfigError
from accel_state.topology import Topology

__all__ = ["DataLoaderConfiguration", "prepare_data_loader", "skip_first_batches"]

AnyLoader: TypeAlias = "ShardedLoader | DataLoader[Any]"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataLoaderConfiguration:
    """How loaders are sharded."""

    split_batches: bool = False
    """Whether the batch size of a loader is that of the global batch, which the ranks divide; else each rank
    gets batches of that size."""
    even_batches: bool = True
    """Whether all ranks get as many batches, of as many rows, by repeating samples at the end. Repeats are marked."""
    data_seed: int | None = None
    """Seed of the order of samples; ``None`` draws one from the loader's generator, else torch's default one."""
    non_blocking: bool = False
    """Whether copies to the device overlap with the host. Needs pinned memory; ignored where nothing is copied."""

    def __post_init__(self) -> None:
        seed = self.data_seed
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63):
            raise ConfigError(
                f"`data_seed={seed!r}` was given, and a seed is an integer from 0 to 2**63 - 1. "
                f"Give such a number, or `None` to have one drawn."
            )


def prepare_data_loader(
    loader: AnyLoader,
    *,
    topology: Topology,
    device: torch.device | None = None,
    config: DataLoaderConfiguration | None = None,
    name: str = "data loader",
) -> ShardedLoader:
    """Shard `loader` over the data ranks of `topology`. Every rank must call this where the world has several.

    The dataset, workers, collation and pinning of the loader are used as they are; its sampler decides the
    order. A loader that is sharded already comes back as it is.

    Args:
        loader: over a map-style or an iterable dataset, with automatic batching.
        topology: this rank's place; ranks with one ``data_rank`` get the same samples.
        device: where batches are moved to; ``None`` leaves them where they are.
        config: how to shard.
        name: how the loader is called in errors.

    Raises:
        ConfigError: if it is no DataLoader, is sharded by its sampler already, or cannot be sharded as asked.
    """
    config = config or DataLoaderConfiguration()
    if isinstance(loader, ShardedLoader):
        return loader
    _check(loader, topology, name)
    iterable = isinstance(loader.dataset, IterableDataset)
    make = _stream_source if iterable else _map_source
    source, inner = make(loader, topology, config, name)
    seed = config.data_seed
    if seed is None:
        seed = agree(draw_seed(loader.generator or getattr(loader.sampler, "generator", None)), topology)
    return ShardedLoader(
        source,
        user_loader=loader,
        inner=inner,
        seed=seed,
        device=device,
        non_blocking=config.non_blocking,
        data_world_size=topology.data_world_size,
        name=name,
    )


def skip_first_batches(loader: AnyLoader, num_batches: int = 0) -> AnyLoader:
    """A loader whose next iteration leaves the first batches of the epoch out, without fetching them.

    A `ShardedLoader` gives one that shares its place (see `ShardedLoader.skip_first`). A plain DataLoader gives
    a plain one with the same sampler; over an iterable dataset, one that reads up to there without collating.

    Raises:
        ConfigError: if `num_batches` is no count, or `loader` is no DataLoader.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 0:
            raise ConfigError(
                f"`num_batches={num_batches!r}` was given to skip, which is no number of batches. "
                f"Give an integer of at least 0."
            )
        indices = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        skipping = _SkipFirst(indices, num_batches)
        if loader.batch_sampler is None:
            return _rebuilt(loader, sampler=skipping, batch_size=None, generator=loader.generator)
        return _rebuilt(loader, batch_sampler=skipping, generator=loader.generator)
    return prepare_data_loader(loader, topology=Topology()).skip_first(num_batches)


class _SkipFirst(Sampler[Any]):
    """What a sampler gives, but for the first items of the first iteration."""

    def __init__(self, sampler: Any, num_items: int) -> None:
        self._sampler = sampler
        self._num_items = num_items

    def __iter__(self) -> Iterator[Any]:
        skip, self._num_items = self._num_items, 0
        return islice(iter(self._sampler), skip, None)

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._num_items)


def _check(loader: object, topology: Topology, name: str) -> None:
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"A `{type(loader).__name__}` was given as {name}, and only a `torch.utils.data.DataLoader` can be "
            f"sharded. Wrap the data in a DataLoader."
        )
    if not getattr(loader, "in_order", True):
        raise ConfigError(
            f"The {name} was built with `in_order=False`, so which batch comes when depends on the speed of its "
            f"workers, and neither padding nor a place in the epoch can be told. Build it with `in_order=True`."
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ConfigError(
            f"The {name} was built with `batch_size=None`: its dataset makes batches itself, so single samples cannot "
            f"be dealt out to {topology.data_world_size} data ranks. "
            f"Build it with a `batch_size`, or with a `batch_sampler` for batches of your own making."
        )
    if isinstance(loader.dataset, IterableDataset):
        return
    refuse_sharded(loader, topology, name=name)
    indices = loader.batch_sampler if recognise(loader) == "batch_sampler" else loader.batch_sampler.sampler  # type: ignore[union-attr]
    for what, each in (("dataset", loader.dataset), ("sampler", indices)):
        if not hasattr(each, "__len__"):
            raise ConfigError(
                f"The {what} of the {name}, a `{type(each).__name__}`, has no length, so an epoch cannot be divided "
                f"evenly nor resumed. Give it a `__len__`, or make the dataset an `IterableDataset`."
            )


def _map_source(
    loader: DataLoader[Any], topology: Topology, config: DataLoaderConfiguration, name: str
) -> tuple[Source, DataLoader[Any]]:
    batch_sampler = ShardedBatchSampler()
    inner = _rebuilt(loader, batch_sampler=batch_sampler)
    kind = recognise(loader)
    user_sampler: Any = loader.batch_sampler
    if kind == "batch_sampler":
        return BatchSource(
            inner,
            batch_sampler,
            user_sampler=user_sampler,
            split=config.split_batches,
            even=config.even_batches,
            topology=topology,
            name=name,
        ), inner
    assert isinstance(user_sampler, BatchSampler)
    return SampleSource(
        inner,
        batch_sampler,
        sampler=user_sampler.sampler,
        kind=kind,
        batch_size=_rank_batch_size(user_sampler.batch_size, topology, config, name),
        drop_last=user_sampler.drop_last,
        even=config.even_batches,
        topology=topology,
        name=name,
    ), inner


def _stream_source(
    loader: DataLoader[Any], topology: Topology, config: DataLoaderConfiguration, name: str
) -> tuple[Source, DataLoader[Any]]:
    assert loader.batch_size is not None
    dataset: Any = loader.dataset
    batch_size = _rank_batch_size(loader.batch_size, topology, config, name)
    stream = ShardedStream(
        dataset,
        collate=loader.collate_fn,
        batch_size=batch_size,
        world=topology.data_world_size,
        rank=topology.data_rank,
        drop_last=loader.drop_last,
        even=config.even_batches,
    )
    if loader.num_workers:
        stream.share_memory()
    inner = _rebuilt(
        loader,
        dataset=stream,
        batch_size=None,
        collate_fn=hand_over,
        worker_init_fn=StreamWorkerInit(loader.worker_init_fn) if loader.num_workers else None,
    )
    return StreamSource(inner, stream, batch_size=batch_size, topology=topology), inner


def _rank_batch_size(given: int, topology: Topology, config: DataLoaderConfiguration, name: str) -> int:
    """Rows of one rank in a full batch, from the batch size of the user's loader."""
    world = topology.data_world_size
    if not config.split_batches:
        return given
    if given % world:
        lower = given // world * world
        choices = f"{lower} or {lower + world}" if lower else f"{world}"
        raise ConfigError(
            f"`batch_size={given}` of the {name} is that of the global batch under `split_batches=True`, and "
            f"{world} data ranks do not divide it. Set it to {choices}, or set `split_batches=False`."
        )
    return given // world


def _rebuilt(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A loader with the workers, collation and pinning of another."""
    arguments: dict[str, Any] = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "generator": torch.Generator(),
    }
    if loader.num_workers:
        arguments["multiprocessing_context"] = loader.multiprocessing_context
        arguments["prefetch_factor"] = loader.prefetch_factor
        arguments["persistent_workers"] = loader.persistent_workers
    if loader.pin_memory_device:
        arguments["pin_memory_device"] = loader.pin_memory_device
    return DataLoader(**{**arguments, **changes})
