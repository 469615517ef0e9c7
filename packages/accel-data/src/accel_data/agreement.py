"""Values that all ranks have to hold alike, or to know of one another; before any batch is read."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.topology import Topology

__all__ = ["agree", "check_group", "has_peers", "share"]


def agree(value: Any, topology: Topology) -> Any:
    """`value` of rank 0, on all ranks. All must call this where the world has several processes.

    In a world that is only simulated, without a process group of its size, every rank keeps its own.
    """
    if not has_peers(topology):
        return value
    holder = [value]
    if Process.is_open():
        return broadcast_object_list(holder)[0]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def share(value: Any, topology: Topology) -> list[Any]:
    """What each rank of the world gave, in order of rank. All must call this where the world has several processes.

    In a world that is only simulated, what this rank gave, alone.
    """
    if not has_peers(topology):
        return [value]
    if Process.is_open():
        return gather_object([value])
    values: list[Any] = [None] * topology.world_size
    dist.all_gather_object(values, value)
    return values


def check_group(topology: Topology, purpose: str, otherwise: str, *, name: str) -> None:
    """Check that ranks of a world of several can talk.

    Raises:
        ConfigError: where there is no process group of its size.
    """
    if topology.world_size > 1 and not has_peers(topology):
        raise ConfigError(
            f"The {name} was prepared for {topology.world_size} processes, and there is no process group of that size "
            f"by which they could {purpose}. Call `init_process_group`, or create an `Accelerator`, before preparing "
            f"loaders, {otherwise}."
        )


def has_peers(topology: Topology) -> bool:
    """Whether a process group of the size of the world is there."""
    if topology.world_size == 1 or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size() == topology.world_size
