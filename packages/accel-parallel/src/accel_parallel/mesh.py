"""The process groups behind the axes of a mesh. Made once, by every rank in the same order."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from accel_state.process import Process
from accel_state.topology import Axis, MeshShape, Topology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Mesh"]

_SHARING: tuple[Axis, ...] = ("dp_shard", "cp", "sp")
"""Axes whose ranks share one copy of the parameters in shards. Those of one sequence do too: they hold the same
parameters, so that nothing is gained by a copy for each (as in torchtitan's meshes)."""


class Mesh:
    """A world divided along axes, as groups of processes."""

    def __init__(self, process: Process, shape: MeshShape | None = None) -> None:
        """Every rank must call this.

        Args:
            process: the open process, with a group.
            shape: how to divide the world; by default as the process's topology says.
        """
        from torch.distributed.device_mesh import init_device_mesh

        self.topology = topology = replace(process.topology, mesh=shape or process.topology.shape)
        shape = topology.shape
        wide = [axis for axis in _SHARING if shape.size_of(axis) > 1]
        shard = "_".join(wide) or "dp_shard"
        sharing = prod(shape.size_of(axis) for axis in _SHARING)
        self.root: DeviceMesh = init_device_mesh(
            process.device.type,
            (shape.dp_replicate, sharing, shape.tp),
            mesh_dim_names=("dp_replicate", shard, "tp"),
        )
        """The whole world. Axes that share parameters are one dim, called after those that hold several ranks, such as
        ``dp_shard`` or ``dp_shard_cp``."""
        self.data: DeviceMesh = self.root["dp_replicate", shard] if shape.dp_replicate > 1 else self.root[shard]
        """Over which `fully_shard` works: (dp_replicate, dp_shard), or (dp_shard) where there is one replica."""
        self.tp: DeviceMesh | None = self.root["tp"] if shape.tp > 1 else None
        """The ranks that share each matrix, where there are several."""
        self.average_size = shape.dp_replicate * sharing
        """Over how many ranks gradients are averaged: those whose tokens differ."""
        self._groups: dict[Axis, dist.ProcessGroup] = {}
        axes: tuple[Axis, ...] = ("cp", "sp")
        for axis in axes:
            if shape.size_of(axis) > 1:
                self._groups[axis] = _group_along(topology, axis)
        self._loss_group = self._make_loss_group()

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """The ranks along ``cp`` or ``sp``, where there are several."""
        return self._groups[axis]

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over the ranks whose tokens differ, on each of them. Every rank must call this."""
        total = value.clone()
        if self.average_size > 1:
            dist.all_reduce(total, group=self._loss_group)
        return total

    def _make_loss_group(self) -> dist.ProcessGroup | None:
        """The ranks at this one's place along tp; the world's own group where that is everybody."""
        topology = self.topology
        if topology.shape.tp == 1:
            return None
        own: dist.ProcessGroup | None = None
        places: dict[int, list[int]] = {}
        for rank in range(topology.world_size):
            places.setdefault(topology.at(rank).coord("tp"), []).append(rank)
        for ranks in places.values():  # every rank makes every group, in one order
            group = dist.new_group(ranks)
            if topology.rank in ranks:
                own = group
        return own


def _group_along(topology: Topology, axis: Axis) -> dist.ProcessGroup:
    """The group of this rank along `axis`; every rank makes every such group, in one order."""
    own: dist.ProcessGroup | None = None
    for ranks in sorted({topology.at(rank).ranks_along(axis) for rank in range(topology.world_size)}):
        group = dist.new_group(list(ranks))
        if topology.rank in ranks:
            own = group
    assert own is not None
    return own
