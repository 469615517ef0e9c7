"""One way to spread a training run over processes, before anything is known of its cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from accel_parallel.auto.profile import ModelProfile
from accel_parallel.parallelism import ParallelismConfig
from accel_state.errors import ConfigError

__all__ = ["Layout", "StrategyName", "Workload", "divisors", "layouts", "ranks_per_node", "tensor_parallel_sizes"]

StrategyName = Literal["single", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is trained on: sizes that the user chose, the same for every candidate."""

    batch_size: int
    """Samples of a micro-batch on each process that sees data of its own."""
    sequence_length: int = 1
    """Tokens of a sample; 1 where samples have no length."""
    accumulation_steps: int = 1
    """Micro-batches between two optimizer steps."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "accumulation_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"`{name}={value!r}` leaves nothing to train on. Give a positive integer.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A candidate."""

    strategy: StrategyName
    replicate: int = 1
    """Copies of the model."""
    shard: int = 1
    """Processes that share a copy in shards."""
    tp: int = 1
    """Processes that share each matrix multiplication."""
    reshard: bool | None = None
    """Whether units are given up after forward; ``None`` where nothing is sharded."""
    checkpointing: bool = False
    """Whether blocks are computed a second time in backward."""
    offload: bool = False
    """Whether parameters, gradients and optimizer states stay in host memory."""

    @property
    def world_size(self) -> int:
        """Processes altogether."""
        return self.replicate * self.shard * self.tp

    @property
    def data_size(self) -> int:
        """Processes that see different data."""
        return self.replicate * self.shard

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Smaller is simpler: what is chosen of two that are predicted to be equally fast."""
        order = ("single", "ddp", "fsdp").index(self.strategy)
        copies = self.replicate if self.strategy == "fsdp" else 1
        return (self.offload, self.tp, order, self.checkpointing, copies, bool(self.reshard))

    def parallelism(self) -> ParallelismConfig:
        """The sizes as users set them."""
        return ParallelismConfig(dp_replicate_size=self.replicate, dp_shard_size=self.shard, tp_size=self.tp)

    def __str__(self) -> str:
        sizes = [f"{name}={size}" for name, size in self._sizes() if size > 1]
        options = []
        if self.reshard is not None:
            options.append("reshard" if self.reshard else "keep gathered")
        if self.checkpointing:
            options.append("checkpointing")
        if self.offload:
            options.append("cpu offload")
        return ", ".join([" ".join([self.strategy, *sizes]), *options])

    def _sizes(self) -> tuple[tuple[str, int], ...]:
        return (("replicate", self.replicate), ("shard", self.shard), ("tp", self.tp))


def divisors(number: int) -> tuple[int, ...]:
    """All of them, in order."""
    return tuple(divisor for divisor in range(1, number + 1) if number % divisor == 0)


def ranks_per_node(world_size: int, devices_per_node: int) -> int:
    """How many of `world_size` processes share a node."""
    return min(world_size, devices_per_node)


def tensor_parallel_sizes(profile: ModelProfile, *, world_size: int, devices_per_node: int) -> tuple[int, ...]:
    """Sizes of ``tp``, 1 included, that the model allows, within a node, and that divide the world and all heads."""
    local = ranks_per_node(world_size, devices_per_node)
    heads = [count for count in (profile.num_heads, profile.num_kv_heads) if count is not None]
    wanted = (size for size in sorted({1, *profile.tp_sizes}) if profile.hidden_size is not None or size == 1)
    return tuple(size for size in wanted if all(count % size == 0 for count in (local, world_size, *heads)))


def layouts(profile: ModelProfile, *, world_size: int, devices_per_node: int, offload: bool) -> Iterator[Layout]:
    """Every candidate for a world.

    Args:
        profile: of the model; without blocks there is nothing to checkpoint or to reshard.
        world_size: number of processes.
        devices_per_node: processes that share a node.
        offload: whether parameters may stay in host memory.
    """
    again = (False, True) if profile.blocks else (False,)
    away = (False, True) if offload else (False,)
    strategy: StrategyName = "single" if world_size == 1 else "ddp"
    for checkpointing in again:
        yield Layout(strategy=strategy, replicate=world_size, checkpointing=checkpointing)
    for tp in tensor_parallel_sizes(profile, world_size=world_size, devices_per_node=devices_per_node):
        for shard in divisors(world_size // tp):
            for checkpointing, reshard, offloaded in product(again, _reshardings(profile, shard), away):
                if shard == tp == 1 and not (offloaded and world_size == 1):
                    continue  # whole copies without tensor parallel are ddp's
                yield Layout(
                    strategy="fsdp", replicate=world_size // tp // shard, shard=shard, tp=tp, reshard=reshard,
                    checkpointing=checkpointing, offload=offloaded,
                )  # fmt: skip


def _reshardings(profile: ModelProfile, shard: int) -> tuple[bool, ...]:
    # A shard that is all of a unit is copied for use like any other; the root is never given up after forward.
    return (True, False) if profile.blocks and shard > 1 else (True,)
