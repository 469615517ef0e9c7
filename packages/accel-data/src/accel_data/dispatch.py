"""Batches that rank 0 alone reads, handed to the ranks that they are for.

Each rank is sent its own tree and nothing else; trees of different ranks and steps have nothing in common, so ragged
and nested data is as good as any.

The protocol, from rank 0 to one rank, over a gloo group that carries nothing else:

- A message is a head of 8 KiB, then what did not fit into it. The head holds a mark, the kind of the message, the
  number of the iteration, the number of the step in it, and two sizes: that of the skeleton (the tree with notes in
  place of tensors, see `packing`) and that of the row of its small tensors. Skeleton and row follow in the head if
  there is room, otherwise as one second part. Large tensors follow one by one, straight out of the memory they lie
  in and into the memory of those that are handed out. A skeleton of size 0: the same as before.
- Kinds: a batch; the end of an iteration (all was read); left (rank 0's loop was left after that many steps); failed
  (reading raised, and the head holds what). Every iteration that has begun closes with one of the last three.
- A rank receives in advance one head, the next one. So what consists of a head arrives whatever that rank is doing:
  rank 0 can say that its loop was left without waiting for those who left theirs too and will not ask.
- gloo moves a part when both sides have named its memory. Rank 0 names it and goes on to its own step; it waits for
  a step to be taken only before it sends the next one, and keeps the tensors until then.

Iterations are counted on each side by itself, since all ranks begin the same ones in the same order, and steps too. A
rank that asks for a step takes what is sent to it until its own comes:

- a close of an iteration that it has left is dropped, of another one it is in is kept for that one;
- a batch of another iteration, or of a step that it does not ask for, raises: the loops of the ranks differ;
- where its own iteration closes with "left" or "failed", it raises and says what rank 0 said.

A process that is gone closes its connections, and whoever waits for it raises: as a rule at once, at the latest after
the group's timeout, which was seen where connections were cut while a part was being named. A rank that lives and
never asks again (it left its loop, rank 0 did not, and it starts no other) is waited for until the group's timeout, as
in any collective; then rank 0 raises. Its next iteration, if there is one, raises at once, as above.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from accel_data.channel import LAST_WORD_S, Arrival, DispatchError, Kind, TreeChannel
from accel_state.topology import Topology

__all__ = ["DispatchError", "DispatchedSteps", "TreeChannel"]

_END: Any = object()


class DispatchedSteps:
    """What rank 0 reads, dealt out: `deal` there and `take` on every other rank, once an iteration, in the same order.

    Iterations may be nested, as loops are, if they are on all ranks. One object serves all loaders of a channel.

    Args:
        channel: to or from rank 0; not used by anything else.
        topology: this rank's place.
    """

    def __init__(self, channel: TreeChannel, topology: Topology) -> None:
        self._channel = channel
        self._topology = topology
        self._begun = 0
        self._taken: dict[int, int] = {}
        """Of the iterations that rank 0 has not closed yet as far as is known here: batches taken."""
        self._left: set[int] = set()
        """Those of them that were left here."""
        self._closes: dict[int, Arrival] = {}
        """Of iterations in progress: how rank 0 closed them, told before it was asked for."""

    def close(self) -> None:
        """Give up the channel. Every rank should, between iterations."""
        self._channel.close()

    def deal(self, steps: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """On rank 0: send the others their trees, and yield its own.

        The next step is read while the last one is under way, so each must be of new memory.

        Args:
            steps: of each step one tree a data rank.

        Raises:
            DispatchError: if another rank is gone. What reading raises is raised, after all ranks were told.
        """
        channel, iteration = self._channel, self._begin()
        own = self._topology.data_rank
        for step in count():
            try:
                if step == 0:
                    source = iter(steps)
                trees = next(source, _END)
                if trees is not _END:
                    channel.send(trees, iteration=iteration, step=step)
            except BaseException as error:
                said = "".join(traceback.format_exception_only(error)).strip()
                with contextlib.suppress(DispatchError):
                    channel.close_iteration(Kind.FAILED, iteration, step, said=said, limit_s=LAST_WORD_S)
                raise
            if trees is _END:
                channel.close_iteration(Kind.END, iteration, step)
                channel.settle()
                return
            mine, trees = trees[own], None
            left = True
            try:
                yield mine
                left = False
            finally:
                if left:
                    with contextlib.suppress(DispatchError, ValueError):  # the group may be gone, at exit
                        channel.close_iteration(Kind.LEFT, iteration, step + 1)

    def take(self) -> Iterator[Any]:
        """On the others: yield the trees that rank 0 deals to this rank, until it has read all.

        Raises:
            DispatchError: if rank 0 failed, left its loop earlier, or is gone, or if the loops of the ranks differ.
        """
        iteration = self._begin()
        self._taken[iteration] = 0
        try:
            for step in count():
                arrival = self._closes.pop(iteration, None) or self._next(iteration)
                if arrival.kind is not Kind.BATCH:
                    del self._taken[iteration]
                    if arrival.kind is Kind.END:
                        return
                    raise self._closed(arrival, step)
                if arrival.step != step:
                    raise self._differs(arrival, iteration)
                self._taken[iteration] = step + 1
                yield arrival.content
        finally:
            if iteration in self._taken:
                self._left.add(iteration)
            if self._closes.pop(iteration, None) is not None:
                self._forget(iteration)

    def _begin(self) -> int:
        self._begun += 1
        return self._begun

    def _next(self, iteration: int) -> Arrival:
        """The next message of an iteration; closes of others are put where they belong."""
        while True:
            arrival = self._channel.receive()
            if arrival.iteration == iteration:
                return arrival
            if arrival.kind is Kind.BATCH or arrival.iteration not in self._taken:
                raise self._differs(arrival, iteration)
            if arrival.iteration in self._left:
                self._forget(arrival.iteration)
            else:
                self._closes[arrival.iteration] = arrival

    def _forget(self, iteration: int) -> None:
        self._left.discard(iteration)
        self._taken.pop(iteration, None)

    def _closed(self, arrival: Arrival, step: int) -> DispatchError:
        rank, number = self._topology.rank, f"batch {step + 1} of iteration {arrival.iteration}"
        if arrival.kind is Kind.FAILED:
            return DispatchError(
                f"Rank {rank} asked for {number}, and rank 0, which reads for all ranks, failed to read it: "
                f"{arrival.content}\nMend that; rank 0 shows where it was raised."
            )
        return DispatchError(
            f"Rank {rank} asked for {number}, but rank 0, which reads for all ranks, left its loop after "
            f"{arrival.step} batch(es) of it (`break`, or an error). Let all ranks leave the loop at the same batch, "
            f"or set `dispatch_batches=False`."
        )

    def _differs(self, arrival: Arrival, iteration: int) -> DispatchError:
        asked = f"batch {self._taken[iteration] + 1} of iteration {iteration}"
        sent = f"batch {arrival.step + 1} of iteration {arrival.iteration}"
        if arrival.kind is not Kind.BATCH:
            sent = f"the end of iteration {arrival.iteration}"
        left = ""
        if arrival.iteration in self._left:
            left = f", an iteration that this rank left after {self._taken[arrival.iteration]} batch(es)"
        return DispatchError(
            f"Rank {self._topology.rank} asked for {asked}, but rank 0, which reads for all ranks, sent {sent}{left}. "
            f"Let all ranks iterate in the same order and leave loops at the same batch, or set "
            f"`dispatch_batches=False`."
        )
