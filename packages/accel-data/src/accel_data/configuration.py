"""How loaders are sharded: what users set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from accel_state.errors import ConfigError

__all__ = ["DataLoaderConfiguration", "Sharding", "ShardingRule"]

ShardingRule: TypeAlias = "Callable[[Any, int, int], Any]"
"""Called with (dataset, number of parts, part); returns the dataset of that part. There is a part a data rank."""

_Word = Literal["auto", "index", "node", "given"]

Sharding: TypeAlias = "_Word | ShardingRule"
"""Into which parts a dataset is divided before it is cut into batches:

``"auto"``
    An iterable that can divide itself evenly among the data ranks (``num_shards`` and ``shard``, as those of
    Hugging Face ``datasets``) does so, and each rank reads its own part; everything else is cut by index.
``"index"``
    One part: the order is one, and each rank takes its slice of each global batch. An iterable is read by all.
``"node"``
    A part a node, which no other node reads: of a map-style dataset a contiguous block of indices, of an
    iterable what it gives as its shard. Inside a node, by index.
``"given"``
    Each rank's dataset or sampler is its part already.
a function
    The dataset of each data rank's part, by a rule of the user's: see `ShardingRule`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataLoaderConfiguration:
    """How loaders are sharded."""

    split_batches: bool = False
    """Whether the batch size of a loader is that of the global batch, which the ranks divide; else each rank
    gets batches of that size."""
    dispatch_batches: bool | None = None
    """Whether rank 0 alone reads, and hands every rank its samples; ``None`` is no."""
    even_batches: bool = True
    """Whether all ranks get as many batches, of as many rows, by repeating samples at the end. Repeats are marked."""
    use_seedable_sampler: bool = True
    """Whether ``shuffle=True`` draws a keyed permutation, which needs no memory and starts anywhere at once; else
    the order is the one that torch's own ``RandomSampler`` draws from a generator seeded by (seed, epoch)."""
    data_seed: int | None = None
    """Seed of the order of samples; ``None`` draws one from the loader's generator, else torch's default one."""
    non_blocking: bool | None = None
    """Whether the next batch is copied to the device while the step runs, from pinned memory; ``None`` is yes
    wherever the device has streams. Nothing is copied where batches stay on the host."""
    use_stateful_dataloader: bool = True
    """Whether an iterable's own ``state_dict`` is used to resume; else it is read again up to the place."""
    sharding: Sharding = "auto"
    """Into which parts a dataset is divided; see `Sharding`."""

    def __post_init__(self) -> None:
        for name in ("split_batches", "even_batches", "use_seedable_sampler", "use_stateful_dataloader"):
            self._check_flag(name, (True, False))
        for name in ("dispatch_batches", "non_blocking"):
            self._check_flag(name, (True, False, None))
        seed = self.data_seed
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63):
            raise ConfigError(
                f"`data_seed={seed!r}` was given, and a seed is an integer from 0 to 2**63 - 1. "
                f"Give such a number, or `None` to have one drawn."
            )
        if not callable(self.sharding) and self.sharding not in get_args(_Word):
            raise ConfigError(
                f"`sharding={self.sharding!r}` was given, and there is no such rule. "
                f"Give one of {', '.join(map(repr, get_args(_Word)))}, or a function of (dataset, num_parts, part)."
            )
        if self.dispatch_batches and self.sharding not in ("auto", "index"):
            raise ConfigError(
                f"`dispatch_batches=True` was given with `sharding={self.sharding!r}`: rank 0 would read for all, and "
                f"every part is to be read by ranks of its own. Leave one of the two out."
            )

    def _check_flag(self, name: str, allowed: tuple[bool | None, ...]) -> None:
        given = getattr(self, name)
        if not any(given is each for each in allowed):
            words = " or ".join(str(each) for each in allowed)
            raise ConfigError(f"`{name}={given!r}` was given, which is not {words}. Give one of those.")
