"""From the user's ``DataLoader`` to a sharded one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe

from accel_data.agreement import agree, check_group, has_peers, share
from accel_data.assembly import SizeExchange
from accel_data.collation import Collation
from accel_data.configuration import DataLoaderConfiguration
from accel_data.dispatch import DispatchedSteps, TreeChannel
from accel_data.loader import ShardedLoader
from accel_data.parts import Parts
from accel_data.prefetch import pin_wanted
from accel_data.randomness import draw_seed
from accel_data.reading import SampleReader, WorkerInit, draws_nothing
from accel_data.sampler import ShardedBatchSampler
from accel_data.sharding import check_alike, divide, divided_sampler, outline, parts_of, refuse_sharded
from accel_data.source import BatchSource, Feed, PartedSource, SampleSource, Source
from accel_data.stream import PartStream, hand_over
from accel_data.stream_source import StreamSource
from accel_data.user_sampler import own_batch_sampler, recognise, sampler_of
from accel_state.errors import ConfigError
from accel_state.topology import Topology

__all__ = ["AnyLoader", "is_loader", "prepare_data_loader", "rebuilt"]

AnyLoader: TypeAlias = "ShardedLoader | DataLoader[Any]"


def is_loader(each: object) -> bool:
    """Whether `prepare_data_loader` takes it for a loader: a DataLoader, or an iterable that knows its place.

    The latter gives batches of its own making, as a ``torchdata.nodes.Loader`` does.
    """
    if isinstance(each, (DataLoader, ShardedLoader)):
        return True
    names = ("__iter__", "state_dict", "load_state_dict")
    return not isinstance(each, torch.nn.Module) and all(callable(getattr(each, name, None)) for name in names)


def prepare_data_loader(
    loader: Any,
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
        loader: a DataLoader over a map-style or an iterable dataset. With ``batch_size=None`` each item of the dataset
            is a batch; so it is for any other iterable with ``state_dict`` and ``load_state_dict``.
        topology: this rank's place; ranks with one ``data_rank`` get the same samples.
        device: where batches are moved to; ``None`` leaves them where they are.
        config: how to shard.
        name: how the loader is called in errors.

    Raises:
        ConfigError: if it is no loader, is sharded already, or cannot be sharded as asked.
    """
    config = config or DataLoaderConfiguration()
    if isinstance(loader, ShardedLoader):
        return loader
    _check(loader, topology, name)
    given = loader if isinstance(loader, DataLoader) else DataLoader(_Batches(loader), batch_size=None)
    iterable = isinstance(given.dataset, IterableDataset)
    refuse_sharded(given, topology, config, name=name)
    make = _stream_source if iterable else _map_source
    source = make(given, topology, device, config, name)
    seed = config.data_seed
    if seed is None:
        if source.key().kind != "sequential":
            check_group(topology, "agree on the seed of the order", "or give a `data_seed`", name=name)
        seed = agree(draw_seed(given.generator or getattr(given.sampler, "generator", None)), topology)
    return ShardedLoader(
        source,
        user_loader=loader,
        seed=seed,
        device=device,
        non_blocking=config.non_blocking,
        data_world_size=topology.data_world_size,
        name=name,
    )


class _Batches(IterableDataset[Any]):
    """An iterable of the user's that gives batches and knows its place, as a dataset."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_batches" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._batches, name)


def _check(loader: object, topology: Topology, name: str) -> None:
    if not is_loader(loader):
        raise ConfigError(
            f"A `{type(loader).__name__}` was given as {name}, and only a `torch.utils.data.DataLoader`, or an "
            f"iterable with `state_dict` and `load_state_dict`, can be sharded. Wrap the data in a DataLoader."
        )
    if not isinstance(loader, DataLoader):
        return
    if not getattr(loader, "in_order", True):
        raise ConfigError(
            f"The {name} was built with `in_order=False`, so which batch comes when depends on the speed of its "
            f"workers, and neither padding nor a place in the epoch can be told. Build it with `in_order=True`."
        )
    kind = type(loader)
    if kind.__iter__ is not DataLoader.__iter__ and not kind.__module__.startswith("torchdata."):
        raise ConfigError(
            f"The {name} is a `{kind.__name__}`, which iterates in a way of its own, and the loader made of it would "
            f"leave that out. Give a plain `DataLoader`, and do what it does in the dataset or in `collate_fn`."
        )
    if isinstance(loader.dataset, IterDataPipe) and loader.num_workers:
        raise ConfigError(
            f"The {name} reads an `IterDataPipe` in {loader.num_workers} workers, which torch divides among them in "
            f"a way that is not known here, so samples would come twice. Set `num_workers=0`, or give an "
            f"`IterableDataset` that divides itself by `get_worker_info()`."
        )
    if getattr(loader, "next_iter_state", None) is not None:
        raise ConfigError(
            f"The {name} was given with a state loaded into it, and the loader made of it would begin elsewhere. "
            f"Prepare it first, and load a state into what `prepare` returns."
        )
    if isinstance(loader.dataset, IterableDataset):
        return
    indices = loader.batch_sampler if own_batch_sampler(loader) else sampler_of(loader)
    for what, each in (("dataset", loader.dataset), ("sampler", indices)):
        if not hasattr(each, "__len__"):
            raise ConfigError(
                f"The {what} of the {name}, a `{type(each).__name__}`, has no length, so an epoch cannot be divided "
                f"evenly nor resumed. Give it a `__len__`, or make the dataset an `IterableDataset`."
            )


def _dealt(topology: Topology, config: DataLoaderConfiguration, name: str) -> DispatchedSteps | None:
    if not config.dispatch_batches or topology.world_size == 1:
        return None
    check_group(topology, "hand out what rank 0 reads", "or leave `dispatch_batches` out", name=name)
    return DispatchedSteps(TreeChannel(topology), topology)


def _map_source(
    loader: DataLoader[Any],
    topology: Topology,
    device: torch.device | None,
    config: DataLoaderConfiguration,
    name: str,
) -> Source:
    parts = parts_of(loader.dataset, topology, config, name=name)
    single = loader.batch_size is None and loader.batch_sampler is None
    _check_split(single, config, name)
    collation = Collation(loader.collate_fn)
    ticketed = not (draws_nothing(loader.dataset) and collation.draws_nothing)
    batch_sampler = ShardedBatchSampler()
    dataset = divide(loader.dataset, parts, config, name=name)
    changes: dict[str, Any] = {"dataset": dataset}
    if ticketed:
        keeps = not single and not collation.draws_nothing
        rank = topology.data_rank
        changes["dataset"] = SampleReader(dataset, name=name, rank=rank, one_a_batch=single, keeps_ticket=keeps)
        changes["collate_fn"] = collation if keeps else loader.collate_fn
        changes["worker_init_fn"] = WorkerInit(loader.worker_init_fn) if loader.num_workers else None
    changes |= {"sampler": batch_sampler, "batch_size": None} if single else {"batch_sampler": batch_sampler}
    inner = rebuilt(loader, device, config, **changes)
    dealt = _dealt(topology, config, name)
    feed = Feed(inner, batch_sampler, ticketed=ticketed, single=single, topology=topology, dealt=dealt)
    kind = recognise(loader, seedable=config.use_seedable_sampler)
    if kind == "batch_sampler":
        _check_batches(parts, config, name)
        return BatchSource(
            feed,
            user_sampler=loader.batch_sampler,
            num_samples=lambda: len(loader.dataset),  # type: ignore[arg-type]
            split=config.split_batches,
            even=config.even_batches,
            topology=topology,
            name=name,
        )
    batch_sampler_given: Any = loader.batch_sampler
    batch_size = 1 if single else _rank_batch_size(batch_sampler_given.batch_size, topology, config, name)
    settings: dict[str, Any] = {
        "kind": kind,
        "batch_size": batch_size,
        "drop_last": False if single else batch_sampler_given.drop_last,
        "even": config.even_batches,
        "topology": topology,
        "name": name,
    }
    sampler = sampler_of(loader)
    if parts.num == 1 and config.sharding != "given":
        _check_alike(sampler, loader.dataset, topology, name)
        return SampleSource(feed, sampler=sampler, **settings)
    sampler = divided_sampler(sampler, dataset, kind, config, name=name)
    lengths = _lengths(len(sampler), loader.dataset, parts, topology, config, name)
    return PartedSource(feed, sampler=sampler, lengths=lengths, parts=parts, **settings)


def _check_batches(parts: Parts, config: DataLoaderConfiguration, name: str) -> None:
    if parts.num > 1 or config.sharding == "given":
        raise ConfigError(
            f"The {name} has a batch sampler of its own, whose batches are of the whole dataset, and `sharding="
            f"{config.sharding!r}` keeps or makes parts of it: how long the batches of other parts are could not be "
            f'told. Use `sharding="index"` with a batch sampler that knows nothing of ranks, or leave the loader '
            f"unprepared."
        )


def _check_alike(sampler: Any, dataset: Any, topology: Topology, name: str) -> None:
    """Check that ranks which cut one dataset among them have the same one, as far as that can be told for free."""
    given = share((len(sampler), outline(dataset)), topology)
    if len(set(given)) == 1:
        return
    lengths = [length for length, _ in given]
    what = f"{', '.join(map(str, lengths))} samples" if len(set(lengths)) > 1 else "other samples"
    raise ConfigError(
        f"The {name} has {what} on ranks 0 to {len(lengths) - 1}: ranks that see other data cannot cut one order among "
        f"them. Give every rank the same dataset, or say with "
        f'`sharding="given"` that each has its own part.'
    )


def _lengths(
    own: int, dataset: Any, parts: Parts, topology: Topology, config: DataLoaderConfiguration, name: str
) -> list[int]:
    """Samples of each part. What other ranks read is asked of them; in a simulated world the rule tells it."""
    if has_peers(topology):
        lengths = dict(share((parts.own, own), topology))
    else:
        others = (Parts(parts.part_of, parts.part_of.index(part)) for part in range(parts.num))
        lengths = {each.own: len(divide(dataset, each, config, name=name)) for each in others}
        lengths[parts.own] = own
    if not all(lengths.values()):
        empty = min(part for part, length in lengths.items() if not length)
        raise ConfigError(
            f"Part {empty} of the {name} holds no sample, so its ranks have nothing to read. "
            f"Divide the dataset so that every part holds some, or use fewer ranks."
        )
    return [lengths[part] for part in range(parts.num)]


def _stream_source(
    loader: DataLoader[Any],
    topology: Topology,
    device: torch.device | None,
    config: DataLoaderConfiguration,
    name: str,
) -> Source:
    dataset: Any = loader.dataset
    size = loader.batch_size
    single = size is None
    _check_split(single, config, name)
    batch_size = 1 if size is None else _rank_batch_size(size, topology, config, name)
    parts = parts_of(dataset, topology, config, name=name)
    if config.sharding != "given":
        check_alike(dataset, topology, name=name)
    several = parts.num > 1 and has_peers(topology)
    speaks = topology.rank == min(_ranks_reading(topology, parts)) if several else True

    def build(stream: PartStream) -> DataLoader[Any]:
        return rebuilt(
            loader,
            device,
            config,
            dataset=stream,
            batch_size=None,
            collate_fn=hand_over,
            worker_init_fn=WorkerInit(loader.worker_init_fn) if loader.num_workers else None,
        )

    return StreamSource(
        dataset,
        divide=lambda num, part: divide(dataset, Parts(tuple(range(num)), part), config, name=name),
        build=build,
        collation=Collation(loader.collate_fn, single=single),
        parts=parts,
        batch_size=batch_size,
        drop_last=loader.drop_last,
        even=config.even_batches,
        stateful=config.use_stateful_dataloader,
        exchange=SizeExchange(parts, speaks=speaks, name=name) if several else None,
        dealt=_dealt(topology, config, name),
        topology=topology,
        num_workers=loader.num_workers,
        persistent=loader.persistent_workers,
        fixed=config.sharding == "given",
        name=name,
    )


def _ranks_reading(topology: Topology, parts: Parts) -> Iterator[int]:
    """World ranks whose data rank reads the same part as this one."""
    for rank in range(topology.world_size):
        if parts.part_of[topology.at(rank).data_rank] == parts.own:
            yield rank


def _check_split(single: bool, config: DataLoaderConfiguration, name: str) -> None:
    if single and config.split_batches:
        raise ConfigError(
            f"The {name} was built with `batch_size=None`, so its dataset makes batches, and `split_batches=True` asks "
            f"to divide them among the ranks: how is not known. Build it with a `batch_size`, or leave "
            f"`split_batches` out, to give each rank whole batches."
        )


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


def rebuilt(
    loader: DataLoader[Any], device: torch.device | None, config: DataLoaderConfiguration, **changes: Any
) -> DataLoader[Any]:
    """A loader with the workers and collation of another, pinned where that lets copies overlap."""
    arguments: dict[str, Any] = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory or pin_wanted(device, config.non_blocking),
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
