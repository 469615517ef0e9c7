"""Trees from rank 0 to each other rank. What a message consists of is told in `dispatch`."""

from __future__ import annotations

import ctypes
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from accel_data.packing import Packed, pack, unpack
from accel_state.errors import AccelError, ConfigError
from accel_state.process import close_group
from accel_state.topology import Topology
from accel_state.tree import tensor_leaves

__all__ = ["LAST_WORD_S", "Arrival", "DispatchError", "Kind", "TreeChannel"]

HEAD_BYTES = 8 * 1024
"""On loopback a message takes 58 µs at 64 bytes, 64 at 4 KiB, 68 at 16 KiB: little is paid for the room."""
LAST_WORD_S = 30.0
"""How long rank 0 waits for the others to have heard that it failed, and when its process ends for the last batch."""

_MARK = b"tree"
_HEAD = struct.Struct("<4sB3xQQQQ")  # mark, kind, iteration, step, bytes of the skeleton, bytes of the row
_ROOM = HEAD_BYTES - _HEAD.size

_UnderWay = dict[int, list[tuple[Any, torch.Tensor]]]
"""By rank: what is being sent to it, and the memory, which must live until then."""


class DispatchError(AccelError, RuntimeError):
    """Rank 0 and a rank that it reads for have lost each other, or rank 0 could not read."""


class Kind(IntEnum):
    """What a message is."""

    BATCH = 1
    END = 2
    LEFT = 3
    FAILED = 4


class Arrival(NamedTuple):
    """A message as a rank other than 0 receives it."""

    kind: Kind
    iteration: int
    step: int
    """Number of the batch, or of those before the close."""
    content: Any
    """The tree; for a failure what was said of it; otherwise nothing."""


class TreeChannel:
    """From rank 0 to each other rank, over a gloo group of its own. Every rank must make it, in the same order.

    In a world of one process it does nothing. It is used by one `DispatchedSteps`.

    Args:
        topology: this rank's place. Ranks that share a data rank are sent the same tree.
        timeout: how long a rank waits for another one that lives; by default as long as its process group does.

    Raises:
        ConfigError: if there are several processes and no process group.
    """

    def __init__(self, topology: Topology, *, timeout: timedelta | None = None) -> None:
        self._topology = topology
        self._group: Any = None
        self._under_way: _UnderWay = {}
        self._sent: dict[int, bytes] = {}
        """By data rank: the last skeleton."""
        self._lost: set[int] = set()
        """Ranks that no message can begin at: gone, or in the middle of one."""
        self._received = b""
        self._failure: str | None = None
        self._next_head: tuple[Any, torch.Tensor] | None = None
        if topology.world_size == 1:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                f"Rank 0 is to dispatch batches to {topology.world_size - 1} other process(es), but there is no "
                f"process group to do it with. Create an `Accelerator()` or call `Process.open()` first."
            )
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        if topology.rank:
            self._expect_head()
        # A process that ends takes with it what it has not sent yet.
        self._finalizer = weakref.finalize(self, _settle_quietly, self._under_way)

    def send(self, trees: Sequence[Any], *, iteration: int = 0, step: int = 0) -> None:
        """On rank 0: begin to send every other rank its tree, as soon as the send before is through.

        Returns while tensors are under way. Until `settle` or the next `send` nobody may write to large tensors of
        other data ranks; those that share memory with rank 0's own tree are copied, so that one is free.

        Args:
            trees: one for each data rank, in order; rank 0's own is not sent anywhere but to ranks that share it.
            iteration: which one it belongs to.
            step: number of the batch in it.

        Raises:
            ConfigError: if there are not as many trees, or one cannot be sent. Nothing was sent then.
            DispatchError: if a rank is gone.
        """
        topology = self._topology
        if len(trees) != topology.data_world_size:
            raise ConfigError(
                f"{len(trees)} batches were given to dispatch, and there are {topology.data_world_size} data ranks. "
                f"Give one for each of them."
            )
        if topology.world_size == 1:
            return
        own = tensor_leaves(trees[topology.data_rank])
        places = {rank: topology.at(rank).data_rank for rank in range(1, topology.world_size)}
        packed = {place: pack(trees[place], apart_from=own) for place in set(places.values())}
        self.settle()
        messages = {place: self._message(place, each, iteration, step) for place, each in packed.items()}
        for rank, place in places.items():
            self._post(rank, messages[place])

    def close_iteration(
        self, kind: Kind, iteration: int, step: int, *, said: str = "", limit_s: float | None = None
    ) -> None:
        """On rank 0: tell every rank that can be told. Does not wait for it; call `settle` for that.

        Args:
            kind: any but a batch.
            iteration: which one.
            step: batches that were sent in it.
            said: of a failure; what is too long for a head is left out of its middle.
            limit_s: seconds to wait for all that is under way; ``None``: do not wait.

        Raises:
            DispatchError: if a rank is gone, after the others were told.
        """
        if self._topology.world_size == 1:
            return
        text = _shortened(said.encode("utf-8"))
        head = _filled([_HEAD.pack(_MARK, kind, iteration, step, len(text), 0) + text], [])
        failures: list[DispatchError] = []
        for rank in range(1, self._topology.world_size):
            if rank not in self._lost:
                try:
                    self._post(rank, [head])
                except DispatchError as error:
                    failures.append(error)
        if limit_s is not None:
            _settle_quietly(self._under_way, limit_s)
        if failures:
            raise failures[0]

    def receive(self) -> Arrival:
        """On any other rank: the next message, waited for.

        Raises:
            DispatchError: if rank 0 is gone, or an earlier call was interrupted in the middle of a message.
        """
        if self._failure is not None:
            raise DispatchError(self._failure)
        self._failure = (
            f"Rank {self._topology.rank} was interrupted while it received a batch from rank 0, so it cannot tell "
            f"where the next one begins. End the run, and start it again from the last checkpoint."
        )
        try:
            arrival = self._receive()
        except RuntimeError as error:
            self._failure = (
                f"Rank {self._topology.rank} asked for a batch that rank 0 reads, and the connection to it is lost "
                f"({_first_line(error)}). Rank 0 has ended, or left its loop for longer than the timeout: see what it "
                f"said last, and let all ranks leave the loop at the same batch."
            )
            raise DispatchError(self._failure) from error
        self._failure = None
        return arrival

    def settle(self) -> None:
        """On rank 0: wait until all that was sent is through.

        Raises:
            DispatchError: if a rank is gone or does not ask for its batch until the timeout.
        """
        failures = _settle(self._under_way)
        self._lost.update(failures)
        for rank, error in failures.items():
            raise self._lost_rank(rank, error) from error

    def close(self) -> None:
        """Let the last batches go, and give up the group. A second call does nothing."""
        _settle_quietly(self._under_way)
        group, self._group, self._next_head = self._group, None, None
        self._failure = "The channel to rank 0 is closed, so no batch can be asked for. Make a new one."
        if group is not None:
            self._finalizer.detach()
            close_group(group)

    def _message(self, place: int, packed: Packed, iteration: int, step: int) -> list[torch.Tensor]:
        skeleton = b"" if self._sent.get(place) == packed.skeleton else packed.skeleton
        self._sent[place] = packed.skeleton
        row_size = sum(each.numel() for each in packed.small)
        head = _HEAD.pack(_MARK, Kind.BATCH, iteration, step, len(skeleton), row_size)
        if len(skeleton) + row_size <= _ROOM:
            return [_filled([head, skeleton], packed.small), *packed.large]
        return [_filled([head], []), torch.cat([*_texts([skeleton]), *packed.small]), *packed.large]

    def _post(self, rank: int, parts: list[torch.Tensor]) -> None:
        queue = self._under_way.setdefault(rank, [])
        self._lost.add(rank)  # for as long as only some of the parts are on their way
        try:
            for part in parts:
                if part.numel():
                    queue.append((dist.isend(part, rank, group=self._group), part))
        except RuntimeError as error:
            raise self._lost_rank(rank, error) from error
        self._lost.discard(rank)

    def _expect_head(self) -> None:
        head = torch.empty(HEAD_BYTES, dtype=torch.uint8)
        self._next_head = dist.irecv(head, 0, group=self._group), head

    def _receive(self) -> Arrival:
        assert self._next_head is not None
        work, head = self._next_head
        work.wait()
        mark, kind, iteration, step, skeleton_size, row_size = _HEAD.unpack(_bytes_of(head[: _HEAD.size]))
        assert mark == _MARK, mark
        content, kind = head[_HEAD.size :], Kind(kind)
        coming: list[Any] = []
        tree: Any = None
        if kind is Kind.FAILED:
            tree = _bytes_of(content[:skeleton_size]).decode("utf-8", errors="replace")
        elif kind is Kind.BATCH:
            if skeleton_size + row_size > _ROOM:
                content = torch.empty(skeleton_size + row_size, dtype=torch.uint8)
                dist.recv(content, 0, group=self._group)
            if skeleton_size:
                self._received = _bytes_of(content[:skeleton_size])
            tree = unpack(self._received, content[skeleton_size:], self._fetcher(coming))
        self._expect_head()
        for each in coming:
            each.wait()
        return Arrival(kind, iteration, step, tree)

    def _fetcher(self, coming: list[Any]) -> Callable[[torch.Tensor], None]:
        return lambda data: coming.append(dist.irecv(data, 0, group=self._group))

    def _lost_rank(self, rank: int, error: RuntimeError) -> DispatchError:
        return DispatchError(
            f"Rank 0 read a batch for rank {rank}, and could not hand it over ({_first_line(error)}). That rank has "
            f"ended, or left its loop: see what it said last, and let all ranks leave the loop at the same batch."
        )


def _settle(under_way: _UnderWay, limit_s: float | None = None) -> dict[int, RuntimeError]:
    """Wait for all of it, and give what failed by rank. Nothing is under way then."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    failures: dict[int, RuntimeError] = {}
    for rank, queue in under_way.items():
        try:
            for work, _ in queue:
                if deadline is None:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError as error:
            failures[rank] = error
        queue.clear()
    return failures


def _settle_quietly(under_way: _UnderWay, limit_s: float = LAST_WORD_S) -> None:
    _settle(under_way, limit_s)


def _filled(texts: list[bytes], rows: list[torch.Tensor]) -> torch.Tensor:
    """A head: uint8[HEAD_BYTES]."""
    parts = [*_texts(texts), *rows]
    return torch.cat([*parts, torch.zeros(HEAD_BYTES - sum(each.numel() for each in parts), dtype=torch.uint8)])


def _texts(texts: list[bytes]) -> list[torch.Tensor]:
    joined = bytearray(b"".join(texts))
    return [torch.frombuffer(joined, dtype=torch.uint8)] if joined else []


def _bytes_of(data: torch.Tensor) -> bytes:
    return ctypes.string_at(data.data_ptr(), data.numel())  # `bytes(tensor.tolist())` takes 70 µs for 8 KiB


def _shortened(text: bytes) -> bytes:
    if len(text) <= _ROOM:
        return text
    half = _ROOM // 2 - 8
    return text[:half] + b" [...] " + text[-half:]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
