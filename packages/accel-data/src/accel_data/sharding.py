"""How a dataset is divided into parts: by itself, by node, by the user's rule, or before it came here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from accel_data.agreement import share
from accel_data.configuration import DataLoaderConfiguration
from accel_data.hugging_face import first_and_last_row, is_streaming, shuffle_state, split, split_among
from accel_data.parts import Parts, one_part, part_a_node, part_a_rank
from accel_data.position import OrderKind
from accel_data.user_sampler import aware_of_ranks, num_parts_of
from accel_state.errors import ConfigError
from accel_state.topology import Topology

__all__ = ["check_alike", "divide", "divided_sampler", "outline", "parts_of", "refuse_sharded"]


def refuse_sharded(loader: DataLoader[Any], topology: Topology, config: DataLoaderConfiguration, *, name: str) -> None:
    """Refuse a loader that gives out one of several parts already: sharding it again would lose samples.

    Raises:
        ConfigError: naming what divides it and both ways out; and under ``sharding="given"`` where it is not divided
            as said.
    """
    iterable = isinstance(loader.dataset, IterableDataset)
    sampler = None if iterable else aware_of_ranks(loader)
    num = split_among(loader.dataset) if sampler is None else num_parts_of(sampler)
    what = "dataset that was split by node" if sampler is None else f"`{type(sampler).__name__}`"
    if config.sharding == "given":
        _check_kept(sampler, num, topology, name)
        return
    if num == 1 and (sampler is None or topology.data_world_size == 1):
        return
    raise ConfigError(
        f"The {name} has a {what}, which gives out one of {num} parts already: sharding it again over "
        f"{topology.data_world_size} data ranks would leave out samples. Either build the loader without it "
        f"(`shuffle=True` for a random order) and let it be sharded here, or keep its own sharding with "
        f'`DataLoaderConfiguration(sharding="given")`, or leave the loader unprepared.'
    )


def parts_of(dataset: Any, topology: Topology, config: DataLoaderConfiguration, *, name: str) -> Parts:
    """Who reads which part.

    Raises:
        ConfigError: where the dataset cannot be divided as asked.
    """
    rule, world = config.sharding, topology.data_world_size
    if callable(rule) or rule == "given":
        return part_a_rank(topology)
    iterable = isinstance(dataset, IterableDataset)
    if rule == "node":
        parts = part_a_node(topology)
        if iterable and parts.num > 1 and not _divides(dataset, parts.num):
            raise ConfigError(
                f'`sharding="node"` was given, and the dataset of the {name}, a `{type(dataset).__name__}`, cannot '
                f"divide itself into {parts.num} parts of as many shards (`num_shards`, `shard`). Give a function of "
                f'(dataset, num_parts, part) that does, or use `sharding="index"`.'
            )
        return parts
    if rule == "auto" and iterable and not config.dispatch_batches and world > 1 and _divides(dataset, world):
        return part_a_rank(topology)
    return one_part(topology)


def divide(dataset: Any, parts: Parts, config: DataLoaderConfiguration, *, name: str) -> Any:
    """The dataset of the part that this rank reads.

    Raises:
        ConfigError: where a rule of the user's gives none.
    """
    rule, num, part = config.sharding, parts.num, parts.own
    if rule == "given" or (num == 1 and not callable(rule)):
        return dataset
    if callable(rule):
        own = rule(dataset, num, part)
        if own is None or isinstance(own, IterableDataset) != isinstance(dataset, IterableDataset):
            raise ConfigError(
                f"The sharding rule of the {name} gave a `{type(own).__name__}` for part {part} of {num} of a "
                f"`{type(dataset).__name__}`, which the loader cannot read instead. Return a dataset of the same kind."
            )
        return own
    if is_streaming(dataset):
        return split(dataset, num, part)
    if isinstance(dataset, IterableDataset):
        return dataset.shard(num_shards=num, index=part)  # type: ignore[attr-defined]
    length = len(dataset)
    return Subset(dataset, range(length * part // num, length * (part + 1) // num))


def divided_sampler(sampler: Any, dataset: Any, kind: OrderKind, config: DataLoaderConfiguration, *, name: str) -> Any:
    """What gives the order of a part: its own indices, or the user's sampler where that is for the part already.

    Raises:
        ConfigError: where the sampler gives indices of the whole dataset.
    """
    if config.sharding == "given":
        return sampler
    if kind != "sampler":
        return SequentialSampler(dataset)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return RandomSampler(dataset)
    raise ConfigError(
        f"The {name} has a `{type(sampler).__name__}`, which orders the whole dataset, and `sharding="
        f"{config.sharding!r}` divides that into parts with an order of their own. Use `shuffle=True` or no sampler, "
        f'or `sharding="index"`.'
    )


def check_alike(dataset: Any, topology: Topology, *, name: str) -> None:
    """Check that ranks which read one stream, or divide it, have the same one.

    Raises:
        ConfigError: where they would draw different orders.
    """
    states = share(shuffle_state(dataset), topology)
    if len(set(states)) > 1:
        raise ConfigError(
            f"The dataset of the {name} was shuffled without a seed, so every rank would read it in an order of its "
            f"own, some samples twice and some never. Give the seed: `dataset.shuffle(seed=...)`."
        )


def outline(dataset: Any) -> str | None:
    """What tells parts of a map-style dataset from each other without reading a sample; ``None`` where nothing does."""
    if isinstance(dataset, Subset):
        indices = dataset.indices
        ends = (indices[0], indices[-1]) if len(indices) else ()
        return f"{len(indices)} {ends} of {outline(dataset.dataset)}"
    return first_and_last_row(dataset)


def _divides(dataset: Any, num_parts: int) -> bool:
    """Whether an iterable dataset can give parts of as many shards each."""
    num_shards: Any = getattr(dataset, "num_shards", None)
    if not isinstance(num_shards, int) or num_shards < num_parts or num_shards % num_parts:
        return False
    return is_streaming(dataset) or callable(getattr(dataset, "shard", None))


def _check_kept(sampler: Any, num: int, topology: Topology, name: str) -> None:
    world = topology.data_world_size
    if num not in (1, world):
        raise ConfigError(
            f'The {name} is divided into {num} parts, and `sharding="given"` keeps them for {world} data ranks. '
            f"Divide it into {world}, one a data rank."
        )
    total, length = getattr(sampler, "total_size", None), _length_of(getattr(sampler, "dataset", None))
    if total is not None and length is not None and total > length:
        raise ConfigError(
            f"The {name} has a `{type(sampler).__name__}` that repeats {total - length} of {length} samples without "
            f"saying which, so metrics would count them twice. Build it with `drop_last=True`, or leave it out and let "
            f"the loader be sharded here, where repeats are marked."
        )


def _length_of(dataset: Any) -> int | None:
    return len(dataset) if isinstance(dataset, Sequence) or hasattr(dataset, "__len__") else None
