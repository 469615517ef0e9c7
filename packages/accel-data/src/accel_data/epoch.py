"""One iteration of a loader: the rest of one epoch, and where it stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from accel_data.position import Position
from accel_data.reading import SampleError
from accel_data.sampler import EpochPlan
from accel_state.protocols import BatchInfo

__all__ = ["MAX_NOTES", "EpochRun", "Note", "PlannedRun", "Step", "StreamRun"]

Step = tuple[Any, Any]
"""A batch of this rank, ``None`` where it has no part in a step, and what its run has to count it by."""

MAX_NOTES = 512
"""Steps of a stream whose places are kept, for going back: each may hold a state of the dataset."""


class EpochRun(Protocol):
    """Hands out this rank's batches of the rest of an epoch and counts them."""

    start: Position

    def steps(self) -> Iterable[Step]:
        """This rank's batches. They count once they are given to `advance`, so one may be taken ahead."""

    def advance(self, note: Any) -> None:
        """The batch that came with `note` is handed out."""

    def info(self) -> BatchInfo | None:
        """The batch handed out last; ``None`` before the first."""

    def position(self, rewind: int) -> Position | None:
        """The place `rewind` batches back; ``None`` where that lies before the start of this run."""

    def num_done(self) -> int:
        """Global batches handed out in this run."""

    def release(self) -> None:
        """It is over: keep what `position` needs, and nothing that data is read by."""


class PlannedRun:
    """A run over data whose order is known beforehand."""

    def __init__(self, start: Position, plan: EpochPlan, batches: Iterable[Any], *, rank: int, name: str) -> None:
        self.start = start
        self._rank = rank
        self._name = name
        self._plan = plan
        self._batches = batches
        self._done = 0
        self._may_pad = plan.may_pad
        self._num_batches = plan.num_batches
        self._num_full = plan.num_full
        self._full_rows = plan.rows(0) if plan.num_full else ()

    def steps(self) -> Iterator[Step]:
        """The batches of the underlying loader as they are."""
        batches, number = self._batches, 0
        try:
            for number, batch in enumerate(batches, 1):  # noqa: B007 - how many there were is asked below
                yield batch, None
            if any(self._plan.rows(step)[self._rank] for step in range(number, self._num_batches)):
                raise SampleError(
                    f"The {self._name} was to give {self._num_batches} batches on data rank {self._rank}, and ended "
                    f"after {number}: `collate_fn` or what it calls raised StopIteration, which ends a loop without a "
                    f"word. Raise another error there, or none."
                )
        finally:
            close(batches)

    def release(self) -> None:
        """Let go of the underlying loader's iterator and of the order."""
        self._batches = ()
        self._plan.release()

    def advance(self, note: Any) -> None:
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
        return None if done < 0 else self._plan.after(self.start, done)


class Note(NamedTuple):
    """What is known of one step of a stream."""

    rows: tuple[int, ...]
    """Rows of each data rank, padding included."""
    real_rows: tuple[int, ...]
    """Real rows of each data rank."""
    is_last: bool
    places: dict[int, Any]
    """Where the parts that this rank reads stand after it, by number of the part."""
    num_parts: int
    """How many parts there are."""


class StreamRun:
    """A run over an iterable dataset."""

    def __init__(self, start: Position, steps: Iterable[tuple[Any, Note]], *, may_pad: bool) -> None:
        self.start = start
        self._steps = steps
        self._may_pad = may_pad
        self._notes: deque[Note] = deque(maxlen=MAX_NOTES)
        self._done = 0
        self._cursor = start.cursor

    def steps(self) -> Iterable[Step]:
        """This rank's batches."""
        return self._steps

    def release(self) -> None:
        """Let go of what reads the stream."""
        self._steps = ()

    def advance(self, note: Note) -> None:
        """Count one step, also where this rank has no part in it."""
        self._done += 1
        self._cursor += sum(note.real_rows)
        self._notes.append(note)

    def info(self) -> BatchInfo | None:
        """The batch handed out last."""
        if not self._notes:
            return None
        note = self._notes[-1]
        return BatchInfo(
            self.start.epoch,
            self.start.batches + self._done - 1,
            note.rows,
            note.real_rows,
            0 if note.is_last else None,
            self._may_pad,
        )

    def num_done(self) -> int:
        """Global batches handed out in this run."""
        return self._done

    def position(self, rewind: int) -> Position | None:
        """The place `rewind` batches back; ``None`` also where that is more than some thousands."""
        if rewind == self._done:
            return self.start
        if rewind >= len(self._notes):
            return None
        undone = list(self._notes)[len(self._notes) - rewind :] if rewind else []
        return replace(
            self.start,
            batches=self.start.batches + self._done - rewind,
            cursor=self._cursor - sum(sum(note.real_rows) for note in undone),
            places=self._notes[-1 - rewind].places,
            num_parts=self._notes[-1 - rewind].num_parts,
        )


def close(source: Any) -> None:
    """Close a generator now, so that what it reads from is let go of before anything else begins."""
    found = getattr(source, "close", None)
    if found is not None:
        found()
