"""One iteration of a loader: the rest of one epoch, and where it stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from accel_data.partition import split_real_rows, split_rows
from accel_data.position import Position
from accel_data.sampler import EpochPlan
from accel_data.stream import Parcel
from accel_state.protocols import BatchInfo

__all__ = ["EpochRun", "PlannedRun", "StreamRun"]

_END: Any = object()
_logger = logging.getLogger(__name__)


class EpochRun(Protocol):
    """Hands out this rank's batches of the rest of an epoch and counts them."""

    start: Position

    def batches(self) -> Iterable[Any]:
        """This rank's batches. `advance` is called for each before it is handed out."""

    def advance(self) -> None: ...
    def info(self) -> BatchInfo | None:
        """The batch handed out last; ``None`` before the first."""

    def position(self, rewind: int) -> Position | None:
        """The place `rewind` batches back; ``None`` where that lies before the start of this run."""

    def num_done(self) -> int:
        """Global batches handed out in this run."""


class PlannedRun:
    """A run over data whose order is known beforehand."""

    def __init__(self, start: Position, plan: EpochPlan, batches: Iterable[Any]) -> None:
        self.start = start
        self._plan = plan
        self._batches = batches
        self._done = 0
        self._may_pad = plan.may_pad
        self._num_batches = plan.num_batches
        self._num_full = plan.num_full
        self._full_rows = plan.rows(0) if plan.num_full else ()

    def batches(self) -> Iterable[Any]:
        """The batches of the underlying loader as they are."""
        return self._batches

    def advance(self) -> None:
        """Count one batch."""
        self._done += 1

    def info(self) -> BatchInfo | None:
        """The batch handed out last."""
        step = self._done - 1
        if step < 0:
            return None
        full = step < self._num_full  # those share one tuple: nothing is computed anew in each step
        return BatchInfo(
            self.start.epoch,
            self.start.batches + step,
            self._full_rows if full else self._plan.rows(step),
            self._full_rows if full else self._plan.real_rows(step),
            self._num_batches - step - 1,
            self._may_pad,
        )

    def num_done(self) -> int:
        """Global batches handed out in this run."""
        return self._done

    def position(self, rewind: int) -> Position | None:
        """The place `rewind` batches back."""
        done = self._done - rewind
        if done < 0:
            return None
        start = self.start
        return Position(
            seed=start.seed,
            epoch=start.epoch,
            batches=start.batches + done,
            cursor=start.cursor + self._plan.consumed(done),
            fingerprint=start.fingerprint,
        )


class StreamRun:
    """A run over an iterable dataset: reads one batch ahead, to know the last one.

    Args:
        start: where it starts.
        parcels: what the underlying loader gives.
        num_skipped: parcels at the front that had been handed out before.
        world: number of data ranks.
        even: whether a partial global batch is padded.
        may_pad: whether any batch may hold padding.
        report: whether to say how long it took to get to `start`.
    """

    def __init__(
        self,
        start: Position,
        parcels: Iterable[Parcel],
        *,
        num_skipped: int,
        world: int,
        even: bool,
        may_pad: bool,
        report: bool,
    ) -> None:
        self.start = start
        self._parcels = parcels
        self._num_skipped = num_skipped
        self._world = world
        self._even = even
        self._may_pad = may_pad
        self._report = report
        self._sizes: list[list[int]] = []  # [samples of a global batch, how many such in a row]
        self._done = 0
        self._is_last = False

    def batches(self) -> Iterator[Any]:
        """This rank's batches, each counted when it is handed out."""
        parcels = iter(self._parcels)
        pending = self._first(parcels)
        while pending is not _END:
            following = next(parcels, _END)
            size, batch = pending
            self._is_last = following is _END
            self._count(size)
            pending = following
            if batch is not None:
                yield batch

    def advance(self) -> None:
        """Nothing: `batches` counts, since a step in which this rank has no part counts too."""

    def info(self) -> BatchInfo | None:
        """The batch handed out last."""
        if not self._sizes:
            return None
        size = self._sizes[-1][0]
        return BatchInfo(
            self.start.epoch,
            self.start.batches + self._done - 1,
            split_rows(size, self._world, even=self._even),
            split_real_rows(size, self._world, even=self._even),
            0 if self._is_last else None,
            self._may_pad,
        )

    def num_done(self) -> int:
        """Global batches handed out in this run."""
        return self._done

    def position(self, rewind: int) -> Position | None:
        """The place `rewind` batches back."""
        if rewind > self._done:
            return None
        cursor, left = self.start.cursor, self._done - rewind
        for size, count in self._sizes:
            cursor += size * min(count, left)
            left -= min(count, left)
        batches = self.start.batches + self._done - rewind
        return Position(seed=self.start.seed, epoch=self.start.epoch, batches=batches, cursor=cursor)

    def _first(self, parcels: Iterator[Parcel]) -> Any:
        began = time.perf_counter()
        for _ in range(self._num_skipped):
            if next(parcels, _END) is _END:
                return _END
        first = next(parcels, _END)
        if self._report and self.start.cursor:
            seconds = time.perf_counter() - began
            _logger.warning(
                "Going on at sample %d of an iterable dataset: the samples before were read again and dropped, "
                "uncollated, in %.1f s (%.0f a second).",
                self.start.cursor,
                seconds,
                self.start.cursor / max(seconds, 1e-9),
            )
        return first

    def _count(self, size: int) -> None:
        self._done += 1
        if self._sizes and self._sizes[-1][0] == size:
            self._sizes[-1][1] += 1
        else:
            self._sizes.append([size, 1])
