"""Into which parts a dataset is divided, and which data ranks read which: pure arithmetic, for any rank of any world.

Ranks that read the same part cut it among them by index. A global batch is the batches of all parts, one after the
other, which is also the order of the data ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from accel_data.partition import share_of, split_real_rows
from accel_state.errors import ConfigError
from accel_state.topology import Topology

__all__ = ["PartedBatches", "Parts", "one_part", "part_a_node", "part_a_rank"]


@dataclass(frozen=True, slots=True)
class Parts:
    """Which part each data rank reads."""

    part_of: tuple[int, ...]
    """Part of each data rank; parts are counted from 0 in order of rank, and ranks of one part are neighbours."""
    rank: int
    """This data rank."""
    members: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Number of data ranks that read each part."""

    def __post_init__(self) -> None:
        counts = Counter(self.part_of)
        object.__setattr__(self, "members", tuple(counts[part] for part in range(self.num)))

    @property
    def num(self) -> int:
        """Number of parts."""
        return self.part_of[-1] + 1

    @property
    def own(self) -> int:
        """Part that this rank reads."""
        return self.part_of[self.rank]

    @property
    def index(self) -> int:
        """Number of this rank among those of its part."""
        return self.rank - self.part_of.index(self.own)

    @property
    def world(self) -> int:
        """Number of data ranks."""
        return len(self.part_of)


def one_part(topology: Topology) -> Parts:
    """All read one."""
    return Parts((0,) * topology.data_world_size, topology.data_rank)


def part_a_rank(topology: Topology) -> Parts:
    """Every data rank reads its own."""
    return Parts(tuple(range(topology.data_world_size)), topology.data_rank)


def part_a_node(topology: Topology) -> Parts:
    """All data ranks of a node read that node's.

    Raises:
        ConfigError: where ranks that have to see the same samples live on different nodes.
    """
    nodes: list[set[int]] = [set() for _ in range(topology.data_world_size)]
    for rank in range(topology.world_size):
        place = topology.at(rank)
        nodes[place.data_rank].add(place.node_rank)
    for data_rank, found in enumerate(nodes):
        if len(found) > 1:
            raise ConfigError(
                f'`sharding="node"` was given, but the ranks that share the samples of data rank {data_rank} are on '
                f"nodes {', '.join(map(str, sorted(found)))}: no node's part would be right for them. "
                f'Keep tensor, context, sequence and pipeline parallel inside a node, or use `sharding="index"`.'
            )
    part_of = [found.pop() for found in nodes]
    known = sorted(set(part_of))
    return Parts(tuple(known.index(node) for node in part_of), topology.data_rank)


class PartedBatches:
    """Global batches over several parts of known lengths.

    Each rank takes `batch_size` rows a step of its part. A part that ends before others gives no real rows from there
    on: its ranks repeat its samples (`even`), or get no batch. With `drop_last`, the first step that some part cannot
    fill is left out, and all after it.

    Args:
        lengths: samples of each part; at least one.
        starts: samples of each part before the first step.
        parts: who reads which.
        batch_size: rows of one rank in a full batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        starts: Sequence[int],
        parts: Parts,
        *,
        batch_size: int,
        drop_last: bool = False,
        even: bool = True,
    ) -> None:
        self._lengths = lengths
        self._starts = starts
        self._parts = parts
        self.batch_size = batch_size
        """Rows of one rank in a full batch."""
        self._even = even
        self._sizes = [batch_size * members for members in parts.members]
        """Samples of each part in a full step."""
        left = [max(0, length - start) for length, start in zip(lengths, starts, strict=True)]
        self.num_full = min(count // size for count, size in zip(left, self._sizes, strict=True))
        """Steps at the front in which every rank has all its rows."""
        steps = max(-(-count // size) for count, size in zip(left, self._sizes, strict=True))
        self.num_batches = self.num_full if drop_last else steps
        """Number of steps."""
        self.may_pad = even and self.num_batches > self.num_full
        """Whether any step holds padding, or may."""

    def rows(self, step: int) -> tuple[int, ...]:
        """Rows of each data rank in `step`, padding included."""
        if step < self.num_full:
            return (self.batch_size,) * self._parts.world
        real = self.real_rows(step)
        return (max(real),) * len(real) if self._even else real

    def real_rows(self, step: int) -> tuple[int, ...]:
        """Real rows of each data rank in `step`."""
        if step < self.num_full:
            return (self.batch_size,) * self._parts.world
        rows: list[int] = []
        for part, members in enumerate(self._parts.members):
            rows += split_real_rows(self._left(part, step), members, even=self._even)
        return tuple(rows)

    def count(self) -> int:
        """Batches that this rank gets."""
        if self._even:
            return self.num_batches
        steps = range(self.num_full, self.num_batches)
        # After the first step in which a rank has no rows its part is over, or has fewer samples than ranks once.
        return self.num_full + sum(self.real_rows(step)[self._parts.rank] > 0 for step in steps)

    def positions(self, step: int) -> list[int]:
        """Positions of this rank's rows in the order of its part, padding included."""
        parts = self._parts
        left = self._left(parts.own, step)
        start = self._starts[parts.own] + step * self._sizes[parts.own]
        share = share_of(left, parts.index, parts.members[parts.own], even=self._even, start=start)
        positions = share.positions
        if self._even:
            missing = range(self.rows(step)[parts.rank] - len(positions))
            # Where the part is over its first samples are repeated, wherever this run of steps began.
            positions += [start + row % left if left else row % self._lengths[parts.own] for row in missing]
        return positions

    def consumed(self, num_steps: int, part: int) -> int:
        """Samples of `part` up to the end of the first steps, from the beginning of the part."""
        start, length = self._starts[part], self._lengths[part]
        return max(start, min(start + num_steps * self._sizes[part], length))

    def _left(self, part: int, step: int) -> int:
        """Samples of a part in a step."""
        size = self._sizes[part]
        return min(size, max(0, self._lengths[part] - self._starts[part] - step * size))
