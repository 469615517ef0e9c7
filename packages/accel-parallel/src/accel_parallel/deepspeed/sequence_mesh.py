"""The axes of a world as torch's meshes name them, for DeepSpeed, which makes none where sequences are divided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel_state.process import Process

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["device_mesh_of"]


def device_mesh_of(process: Process) -> DeviceMesh:
    """Every rank must call this. (dp_replicate, dp_shard, sp, tp) with a group along each axis, in order of rank.

    Neighbouring ranks differ along ``tp`` first, as DeepSpeed's AutoTP has it too.
    """
    from torch.distributed.device_mesh import init_device_mesh

    process.require_group()
    shape = process.topology.shape
    return init_device_mesh(
        process.device.type,
        (shape.dp_replicate, shape.dp_shard, shape.sp, shape.tp),
        mesh_dim_names=("dp_replicate", "dp_shard", "sp", "tp"),
    )
