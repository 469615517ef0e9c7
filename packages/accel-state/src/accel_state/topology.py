"""Where a rank stands in a world of processes: pure arithmetic, no process group, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import prod
from typing import Literal, get_args

from accel_state.errors import ConfigError

__all__ = ["AXES", "Axis", "MeshShape", "Topology"]

Axis = Literal["pp", "dp_replicate", "dp_shard", "cp", "sp", "tp"]
"""Names of the mesh axes, outermost first: neighbouring ranks differ in ``tp`` first, so that the
axis with the most communication stays inside a node."""

AXES: tuple[Axis, ...] = get_args(Axis)

_DATA_AXES: frozenset[Axis] = frozenset({"dp_replicate", "dp_shard"})


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshShape:
    """Number of processes along each axis of parallelism. Their product is the world size."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Copies of the model that see different data."""
    dp_shard: int = 1
    """Processes that see different data and share one copy of the model in shards."""
    cp: int = 1
    """Context parallel: parts of one sequence, attention over the whole of it."""
    sp: int = 1
    """Sequence parallel by exchanging heads for tokens (Ulysses)."""
    tp: int = 1
    """Tensor parallel: parts of one matrix."""

    def __post_init__(self) -> None:
        for axis in fields(self):
            size = getattr(self, axis.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(
                    f"`{axis.name}={size!r}` is not a number of processes: an axis holds at least one. "
                    f"Give a positive integer, or leave `{axis.name}` out for 1."
                )

    @property
    def size(self) -> int:
        """Number of processes that the mesh needs."""
        return prod(self.size_of(axis) for axis in AXES)

    def size_of(self, axis: Axis) -> int:
        """Number of processes along one axis."""
        if axis not in AXES:
            raise ConfigError(f"{axis!r} is not an axis of the mesh, which has {', '.join(AXES)}. Use one of those.")
        size: int = getattr(self, axis)
        return size

    def __str__(self) -> str:
        wide = [f"{axis}={self.size_of(axis)}" for axis in AXES if self.size_of(axis) > 1]
        return " x ".join(wide) or "one process"


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One rank's place in a world. Can be built for any rank of any world without starting it.

    Raises:
        ConfigError: where the numbers contradict one another.
    """

    rank: int = 0
    """Number of this process, 0 to ``world_size - 1``."""
    world_size: int = 1
    """Number of processes altogether."""
    local_rank: int = 0
    """Number of this process on its node."""
    local_world_size: int = 1
    """Number of processes on this node."""
    node_rank: int = 0
    """Number of this node."""
    mesh: MeshShape | None = field(default=None)
    """How the world is divided; by default all of it is ``dp_replicate``."""
    data_rank: int = field(init=False, repr=False, compare=False)
    """Which part of each global batch this rank reads. Peers along tp, cp, sp and pp share it."""

    def __post_init__(self) -> None:
        for name in ("world_size", "local_world_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}={getattr(self, name)}` leaves no process to run. Launch at least one process."
                )
        for name, limit in (("rank", self.world_size), ("local_rank", self.local_world_size)):
            if not 0 <= getattr(self, name) < limit:
                raise ConfigError(
                    f"`{name}={getattr(self, name)}` lies outside 0..{limit - 1}, the processes there are. "
                    f"Check the variables that your launcher sets, or start with `accel launch`."
                )
        if self.local_world_size > self.world_size:
            raise ConfigError(
                f"`local_world_size={self.local_world_size}` is more than `world_size={self.world_size}`: a node "
                f"cannot run more processes than there are. Check the variables that your launcher sets."
            )
        if self.mesh is None:
            object.__setattr__(self, "mesh", MeshShape(dp_replicate=self.world_size))
        elif self.mesh.size != self.world_size:
            raise ConfigError(
                f"`{self.mesh}` needs {self.mesh.size} processes, but the world has {self.world_size}. "
                f"Change an axis so that the product is {self.world_size}, or launch {self.mesh.size} processes."
            )
        data_rank = self.coord("dp_replicate") * self.shape.dp_shard + self.coord("dp_shard")
        object.__setattr__(self, "data_rank", data_rank)  # asked at every gather, so settled here

    @property
    def shape(self) -> MeshShape:
        """The mesh, never ``None``."""
        assert self.mesh is not None
        return self.mesh

    @property
    def num_nodes(self) -> int:
        """Number of nodes, given that each runs as many processes as this one."""
        return -(-self.world_size // self.local_world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the world."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is rank 0 of its node."""
        return self.local_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last rank of the world."""
        return self.rank == self.world_size - 1

    def stride(self, axis: Axis) -> int:
        """Distance in rank between neighbours along an axis."""
        return prod(self.shape.size_of(inner) for inner in AXES[AXES.index(axis) + 1 :])

    def coord(self, axis: Axis) -> int:
        """This rank's index along an axis."""
        return (self.rank // self.stride(axis)) % self.shape.size_of(axis)

    def ranks_along(self, axis: Axis) -> tuple[int, ...]:
        """The ranks that differ from this one in `axis` only, in order, this one included."""
        stride = self.stride(axis)
        first = self.rank - self.coord(axis) * stride
        return tuple(first + index * stride for index in range(self.shape.size_of(axis)))

    @property
    def data_world_size(self) -> int:
        """Into how many parts each global batch is cut."""
        return self.shape.dp_replicate * self.shape.dp_shard

    @property
    def data_peers(self) -> tuple[int, ...]:
        """One rank for each data rank, in order of data rank: those at this rank's other coordinates."""
        inner = {axis: self.coord(axis) for axis in AXES if axis not in _DATA_AXES}
        base = sum(index * self.stride(axis) for axis, index in inner.items())
        return tuple(
            base + replicate * self.stride("dp_replicate") + shard * self.stride("dp_shard")
            for replicate in range(self.shape.dp_replicate)
            for shard in range(self.shape.dp_shard)
        )

    def at(self, rank: int) -> Topology:
        """The same world seen from another rank, on nodes of equal size filled in order of rank."""
        return Topology(
            rank=rank,
            world_size=self.world_size,
            local_rank=rank % self.local_world_size,
            local_world_size=self.local_world_size,
            node_rank=rank // self.local_world_size,
            mesh=self.mesh,
        )
