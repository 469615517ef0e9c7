"""What a user's DataLoader says about the order of its samples, and the order that a sampler of theirs draws."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from accel_data.agreement import agree, has_peers
from accel_data.position import OrderKind
from accel_data.randomness import seeded
from accel_state.errors import ConfigError
from accel_state.topology import Topology

__all__ = [
    "aware_of_ranks",
    "check_fingerprint",
    "draw_items",
    "num_parts_of",
    "own_batch_sampler",
    "recognise",
    "sampler_of",
]


_RANK = ("rank", "_rank")
_WORLD = ("num_replicas", "_num_replicas", "world_size", "_world_size")
"""What samplers that know of ranks call that."""


def recognise(loader: DataLoader[Any], *, seedable: bool = True) -> OrderKind:
    """What decides the order of a map-style `loader`.

    Args:
        loader: the user's.
        seedable: whether a plain random sampler is replaced by a keyed permutation.
    """
    if own_batch_sampler(loader):
        return "batch_sampler"
    sampler = sampler_of(loader)
    if type(sampler) is SequentialSampler:
        return "sequential"
    whole = _is_plain(sampler, RandomSampler) and not sampler.replacement
    if seedable and whole and sampler.num_samples == len(sampler.data_source):
        return "permutation"
    return "sampler"


def own_batch_sampler(loader: DataLoader[Any]) -> bool:
    """Whether the batches are made by something else than torch's plain ``BatchSampler``."""
    return loader.batch_sampler is not None and not _is_plain(loader.batch_sampler, BatchSampler)


def _is_plain(sampler: object, kind: type) -> bool:
    """Whether it is torch's own, or what torchdata puts in the place of that: the same order, with a state."""
    stateful = type(sampler).__module__ == "torchdata.stateful_dataloader.sampler"
    return type(sampler) is kind or (stateful and type(sampler).__name__ == kind.__name__)


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What gives the indices of a map-style `loader`, one by one."""
    batch_sampler = loader.batch_sampler
    return batch_sampler.sampler if isinstance(batch_sampler, BatchSampler) else loader.sampler


def aware_of_ranks(loader: DataLoader[Any]) -> Any:
    """The sampler of a map-style `loader` that gives out one of several parts already; ``None`` if there is none."""
    batch_sampler = loader.batch_sampler
    for sampler in (loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        knows_rank = any(hasattr(sampler, name) for name in _RANK)
        if isinstance(sampler, DistributedSampler) or (knows_rank and any(hasattr(sampler, name) for name in _WORLD)):
            return sampler
    return None


def num_parts_of(sampler: Any) -> int:
    """How many parts a sampler that knows of ranks divides its dataset into."""
    return next((int(getattr(sampler, name)) for name in _WORLD if getattr(sampler, name, None)), 1)


def draw_items(
    sampler: Any, *, seed: int, epoch: int, topology: Topology, name: str, alone: bool = False
) -> tuple[Sequence[Any], str]:
    """What a sampler or batch sampler of the user's gives in an epoch, and its checksum.

    All ranks must call this where the world has several: rank 0 draws, and the others take its list.

    The sampler is told the epoch by ``set_epoch`` where it has that, and it draws under generators seeded by
    (seed, epoch), its own ``generator`` included.

    Args:
        sampler: the user's.
        seed: of the order.
        epoch: which one.
        topology: this rank's place.
        name: how the loader is called in errors.
        alone: whether this rank draws for itself, as for a sampler that knows its rank.

    Raises:
        ConfigError: on all ranks, where the sampler fails.
    """
    told = [each for each in (sampler, getattr(sampler, "sampler", None)) if each is not None]
    drawn: tuple[Sequence[Any] | None, str] = (None, "")
    failure: Exception | None = None
    if alone or topology.is_main or not has_peers(topology):
        found = (getattr(each, "generator", None) for each in told)
        try:
            _tell_epoch(told, epoch)
            with seeded(seed, epoch, generators=tuple(each for each in found if isinstance(each, torch.Generator))):
                drawn = _collected(iter(sampler)), ""
        except Exception as error:
            failure, drawn = error, (None, f"{type(error).__name__}: {error}")
    else:
        _tell_epoch(told, epoch)
    items, problem = drawn if alone else agree(drawn, topology)
    if items is None:
        raise ConfigError(
            f"The sampler of the {name}, a `{type(sampler).__name__}`, was asked for the order of epoch {epoch} on "
            f"{'this rank' if alone else 'rank 0'} and raised {problem}. Without an order no rank can go on: mend the "
            f"sampler."
        ) from failure
    return items, _fingerprint(items)


def _tell_epoch(samplers: Sequence[Any], epoch: int) -> None:
    for each in samplers:
        if hasattr(each, "set_epoch"):
            each.set_epoch(epoch)


def _collected(items: Iterator[Any]) -> Sequence[Any]:
    """All of them; numbers in an array, which takes a fifth of the memory."""
    first = next(items, None)
    if type(first) is int:
        return array("q", chain([first], items))
    return [] if first is None else [first, *items]


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


def _fingerprint(items: Sequence[Any]) -> str:
    try:
        data = (items if isinstance(items, array) else array("q", items)).tobytes()
    except (TypeError, OverflowError):
        data = repr(_plain(items)).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _plain(item: Any) -> Any:
    """As lists, numbers and what else there is: arrays are not the same text everywhere."""
    if hasattr(item, "tolist"):
        return item.tolist()
    return [_plain(each) for each in item] if isinstance(item, (list, tuple)) else item
