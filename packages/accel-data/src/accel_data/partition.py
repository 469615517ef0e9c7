"""Which rows of a global batch go to which data rank: pure arithmetic, for any rank of any world.

A global batch is the next ``batch_size * world`` samples of the epoch's order, and rank *r* takes the *r*-th
contiguous slice of it. So the samples of a step depend on the size of the global batch only, not on the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from accel_state.errors import ConfigError

__all__ = ["GlobalBatches", "Share", "share_of", "split_real_rows", "split_rows"]


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank takes of one global batch."""

    start: int
    """Position in the epoch's order of the first real sample; equals `stop` where there is none."""
    stop: int
    """Position after the last real sample."""
    padding: tuple[int, ...]
    """Positions of the samples that are repeated after the real ones."""

    @property
    def real_rows(self) -> int:
        """Real samples of this rank."""
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """Samples of this rank, padding included; 0 means that it gets no batch in this step."""
        return self.stop - self.start + len(self.padding)

    @property
    def positions(self) -> list[int]:
        """Positions in the epoch's order of all rows."""
        return [*range(self.start, self.stop), *self.padding]


def split_rows(num_rows: int, world: int, *, even: bool) -> tuple[int, ...]:
    """Rows that each rank receives of a global batch of `num_rows` samples, padding included.

    With `even` all receive ``ceil(num_rows / world)``; without, sizes differ by at most one, earlier ranks more.
    """
    if even:
        return (-(-num_rows // world),) * world
    return split_real_rows(num_rows, world, even=False)


def split_real_rows(num_rows: int, world: int, *, even: bool) -> tuple[int, ...]:
    """How many of the rows of `split_rows` are real. Their sum is `num_rows`."""
    if even:
        width = -(-num_rows // world)
        return tuple(min(max(num_rows - rank * width, 0), width) for rank in range(world))
    width, extra = divmod(num_rows, world)
    return tuple(width + (rank < extra) for rank in range(world))


def share_of(num_rows: int, rank: int, world: int, *, even: bool, start: int = 0) -> Share:
    """What `rank` takes of a global batch of `num_rows` samples that begins at position `start`.

    With `even`, the global batch is lengthened to a multiple of `world` by repeating its own samples from its
    first one on, and then cut: real rows are always the first ones of a rank, and all real rows of the world,
    in order of rank, are the first ones of all rows.
    """
    if num_rows == 0:
        return Share(start, start, ())
    if even:
        width = -(-num_rows // world)
        low, high = rank * width, (rank + 1) * width
        padding = tuple(start + row % num_rows for row in range(max(low, num_rows), high))
        return Share(start + min(low, num_rows), start + min(high, num_rows), padding)
    width, extra = divmod(num_rows, world)
    low = rank * width + min(rank, extra)
    return Share(start + low, start + low + width + (rank < extra), ())


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBatches:
    """The global batches into which a run of samples is cut.

    Raises:
        ConfigError: where a number is out of range.
    """

    num_samples: int
    """Samples to be cut, from 0."""
    batch_size: int
    """Rows that one rank takes of a full global batch."""
    world: int
    """Number of data ranks."""
    drop_last: bool = False
    """Whether samples that do not fill a last global batch are left out."""
    even: bool = True
    """Whether all ranks get as many rows of the last, partial global batch, by padding it."""
    full_rows: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Rows of every rank in a full global batch."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 0), ("batch_size", 1), ("world", 1)):
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < least:
                raise ConfigError(
                    f"`{name}={given!r}` was given, and a global batch cannot be made of it. "
                    f"Give an integer of at least {least}."
                )
        object.__setattr__(self, "full_rows", (self.batch_size,) * self.world)

    @property
    def global_size(self) -> int:
        """Samples of a full global batch."""
        return self.batch_size * self.world

    @property
    def num_full(self) -> int:
        """Number of full global batches."""
        return self.num_samples // self.global_size

    @property
    def last_size(self) -> int:
        """Samples of the last, partial global batch; 0 where there is none."""
        return 0 if self.drop_last else self.num_samples % self.global_size

    @property
    def num_batches(self) -> int:
        """Number of global batches."""
        return self.num_full + (self.last_size > 0)

    @property
    def may_pad(self) -> bool:
        """Whether the last global batch holds padding."""
        return self.even and self.last_size % self.world > 0

    def count(self, rank: int) -> int:
        """Number of batches that `rank` gets: all, but for a last one that is too small where not `even`."""
        return self.num_full + (self.share(self.num_full, rank).rows > 0 if self.last_size else 0)

    def rows(self, step: int) -> tuple[int, ...]:
        """Rows of each rank in global batch `step`, padding included."""
        if step < self.num_full:
            return self.full_rows
        return split_rows(self.last_size, self.world, even=self.even)

    def real_rows(self, step: int) -> tuple[int, ...]:
        """Real rows of each rank in global batch `step`."""
        if step < self.num_full:
            return self.full_rows
        return split_real_rows(self.last_size, self.world, even=self.even)

    def share(self, step: int, rank: int) -> Share:
        """What `rank` takes of global batch `step`."""
        start = step * self.global_size
        if step < self.num_full:
            return Share(start + rank * self.batch_size, start + (rank + 1) * self.batch_size, ())
        return share_of(self.last_size, rank, self.world, even=self.even, start=start)

    def consumed(self, num_batches: int) -> int:
        """Samples of the first `num_batches` global batches."""
        if num_batches <= self.num_full:
            return num_batches * self.global_size
        return self.num_full * self.global_size + self.last_size
