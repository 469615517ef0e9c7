"""What a user's DataLoader says about the order of its samples, and the order that a sampler of theirs draws."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from accel_data.position import OrderKind
from accel_data.randomness import seeded
from accel_state.collectives import broadcast_object_list
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.topology import Topology

__all__ = ["agree", "check_fingerprint", "draw_items", "own_batch_sampler", "recognise", "refuse_sharded"]


def recognise(loader: DataLoader[Any]) -> OrderKind:
    """What decides the order of a map-style `loader`."""
    if own_batch_sampler(loader):
        return "batch_sampler"
    sampler = _sampler_of(loader)
    if type(sampler) is SequentialSampler:
        return "sequential"
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return "permutation"
    return "sampler"


def own_batch_sampler(loader: DataLoader[Any]) -> bool:
    """Whether the batches are made by something else than torch's plain ``BatchSampler``."""
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def _sampler_of(loader: DataLoader[Any]) -> Any:
    batch_sampler = loader.batch_sampler
    return batch_sampler.sampler if isinstance(batch_sampler, BatchSampler) else loader.sampler


def refuse_sharded(loader: DataLoader[Any], topology: Topology, *, name: str) -> None:
    """Refuse a loader whose sampler knows of ranks: sharding it again would lose samples.

    Raises:
        ConfigError: naming the sampler and both ways out.
    """
    batch_sampler = loader.batch_sampler
    for sampler in (loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        aware = isinstance(sampler, DistributedSampler) or (
            hasattr(sampler, "num_replicas") and hasattr(sampler, "rank")
        )
        if not aware:
            continue
        parts = getattr(sampler, "num_replicas", 1)
        if topology.data_world_size == 1 and parts == 1:
            continue
        raise ConfigError(
            f"The {name} has a `{type(sampler).__name__}`, which gives out one of {parts} parts already: sharding it "
            f"again over {topology.data_world_size} data ranks would leave out samples. "
            f"Either build the loader without it (`shuffle=True` for a random order) and let it be sharded here, "
            f"or leave the loader unprepared and keep its own sharding."
        )


def draw_items(sampler: Any, *, seed: int, epoch: int, topology: Topology) -> tuple[Sequence[Any], str]:
    """What a sampler or batch sampler of the user's gives in an epoch, and its checksum.

    All ranks must call this where the world has several: rank 0 draws, and the others take its list.

    The sampler is told the epoch by ``set_epoch`` where it has that, and it draws under generators seeded by
    (seed, epoch), its own ``generator`` included.
    """
    told = [each for each in (sampler, getattr(sampler, "sampler", None)) if each is not None]
    for each in told:
        if hasattr(each, "set_epoch"):
            each.set_epoch(epoch)
    items: Sequence[Any] | None = None
    if topology.is_main or not _has_peers(topology):
        found = (getattr(each, "generator", None) for each in told)
        with seeded(seed, epoch, generators=tuple(each for each in found if isinstance(each, torch.Generator))):
            items = list(sampler)
    items = agree(items, topology)
    assert items is not None
    return items, _fingerprint(items)


def check_fingerprint(drawn: str, recorded: str | None, *, epoch: int, name: str) -> None:
    """Refuse to go on in the middle of an order that is another one than before.

    Raises:
        ConfigError: if the sampler drew something else for the same epoch.
    """
    if recorded is not None and recorded != drawn:
        raise ConfigError(
            f"The sampler of the {name} was asked for the order of epoch {epoch} again, to go on in its middle, and "
            f"gave another one than before, so which samples were seen cannot be told. Let it draw from python's, "
            f"numpy's or torch's default generator or from its `generator`, or make it a function of `set_epoch`."
        )


def agree(value: Any, topology: Topology) -> Any:
    """`value` of rank 0, on all ranks. All must call this where the world has several processes.

    In a world that is only simulated, without a process group of its size, every rank keeps its own.
    """
    if not _has_peers(topology):
        return value
    holder = [value]
    if Process.is_open():
        return broadcast_object_list(holder)[0]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _has_peers(topology: Topology) -> bool:
    if topology.world_size == 1 or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size() == topology.world_size


def _fingerprint(items: Sequence[Any]) -> str:
    try:
        data = array("q", items).tobytes()
    except (TypeError, OverflowError):
        data = repr(items).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
