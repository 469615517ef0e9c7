"""Several ranks that load one checkpoint and read it once: each file's bytes come from the disk to one rank only.

Ranks that hold the very files that rank 0 sees, on its node, take turns in reading; each piece then goes to all. What
fails on one rank is told to all, who raise, and nobody waits for a rank that has left: a rank that fails while values
travel goes on taking part with what it has, as everybody else still counts on it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from accel_bigmodel.loading.carry_out import install, make_room
from accel_bigmodel.loading.delivery import Delivery, OpenFiles, Piece, batches, pieces_of
from accel_bigmodel.loading.doubled import check_doubled
from accel_bigmodel.loading.engine import takers_of
from accel_bigmodel.loading.lane import pins
from accel_bigmodel.loading.pickled import MappedTensor
from accel_bigmodel.loading.plan import LoadOptions, LoadPlan, plan_load
from accel_bigmodel.loading.progress import Progress
from accel_bigmodel.loading.result import LoadedCheckpoint
from accel_bigmodel.loading.source import Source, open_checkpoint
from accel_bigmodel.stored import StoredTensor
from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import AccelError, CheckpointError, ConfigError
from accel_state.process import Process

__all__ = ["load_shared"]

_FAILURES = (AccelError, OSError, RuntimeError, TypeError, ValueError, MemoryError)
"""What planning and reading may raise, devices and odd models included. A rank that left with any of these instead of
reporting it would keep its peers waiting."""

T = TypeVar("T")
Batch: TypeAlias = list[tuple[Piece, int]]


def load_shared(model: nn.Module, path: Path, options: LoadOptions, process: Process) -> LoadedCheckpoint:
    """Every rank must call this, with any map and dtype of its own. See `load_checkpoint_in_model`.

    Raises:
        ConfigError: on the rank whose options do not fit, or whose map keeps tensors on disk.
        CheckpointError: as when loading alone; and on every rank where another one failed.
        OSError: on the rank that cannot read.
    """
    view = _common_view(_agree(lambda: _look(path, process), process), options, process)
    plan = _agree(lambda: _plan(model, view, options, path, process), process)
    names = [source.name for source in plan.sources]
    wanted_by_any = {name for each in gather_object([names], process=process) for name in each}
    prepared = _agree(lambda: make_room(model, plan, large_pages=options.reading.large_pages), process)
    wanted = [source for name, source in view.sources.items() if name in wanted_by_any]
    with Progress(sum(each.nbytes for each in wanted), shown=options.progress) as progress:
        rounds = _agree(lambda: _Rounds(process, view, wanted, prepared.deliveries(), progress), process)
        rounds.run()
    _agree(rounds.raise_failure, process)
    return _agree(lambda: install(model, plan, prepared, {}, bytes_read=rounds.bytes_read, bytes_written=0), process)


def _agree(action: Callable[[], T], process: Process) -> T:
    """Every rank must call this. What the action gives, if it fails on none."""
    error: Exception | None = None
    try:
        result = action()
    except _FAILURES as caught:
        error = caught
    told = gather_object([None if error is None else f"{type(error).__name__}: {error}"], process=process)
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise CheckpointError(
                f"Rank {rank} could not load its part, so no rank has the whole model: {text} Mend that, then load "
                f"again on every rank."
            )
    return result


@dataclass(frozen=True, slots=True)
class _Look:
    """What one rank sees of the checkpoint."""

    sources: dict[str, Source]
    files: tuple[tuple[str | int, ...], ...]
    """Host, device, inode, size and time of each file: equal where ranks see the very same."""


def _look(path: Path, process: Process) -> _Look | None:
    """What this rank sees; ``None`` where it sees nothing, which only rank 0 must not."""
    try:
        sources = open_checkpoint(path)
        files = []
        for file in sorted({each.path for each in sources.values()}):
            found = file.stat()
            files.append((socket.gethostname(), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    except _FAILURES:
        if process.topology.is_main:
            raise
        return None
    return _Look(sources, tuple(files))


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """What all ranks agree to see."""

    sources: Mapping[str, Source]
    """In one order on all ranks. Only readers can read them."""
    readers: Sequence[int]
    """Ranks that read."""
    chunk_bytes: int
    """Most that travels at once."""


def _common_view(look: _Look | None, options: LoadOptions, process: Process) -> _View:
    """Every rank must call this. What rank 0 sees is what is loaded."""
    message: list[Any] = [None]
    if process.topology.is_main:
        assert look is not None
        ordered = sorted(look.sources.values(), key=_in_files)
        message = [([_described(each) for each in ordered], look.files, options.reading.chunk_bytes)]
    described, files, chunk_bytes = broadcast_object_list(message, process=process)[0]
    names = [each.name for each in described]
    reads = look is not None and look.files == files and look.sources.keys() == set(names)
    readers = [rank for rank, can in enumerate(gather_object([reads], process=process)) if can]
    sources = {name: look.sources[name] for name in names} if look is not None and reads else None
    return _View(
        sources=sources or {each.name: each for each in described}, readers=readers, chunk_bytes=chunk_bytes
    )  # fmt: skip


def _in_files(source: Source) -> tuple[str, int]:
    return str(source.path), source.offset if isinstance(source, StoredTensor) else 0


def _described(source: Source) -> Source:
    if isinstance(source, StoredTensor):
        return source
    return MappedTensor(source.path, source.name, torch.empty(source.shape, dtype=source.dtype, device="meta"))


def _plan(model: nn.Module, view: _View, options: LoadOptions, path: Path, process: Process) -> LoadPlan:
    plan = plan_load(model, view.sources, options, path)
    if plan.on_disk:
        raise ConfigError(
            f"`device_map` keeps {len(plan.on_disk)} tensors on disk, `{plan.on_disk[0].of.name}` the first, and "
            f"`broadcast_from_rank0=True` is for ranks that may not see the files. Map all to devices, or load without "
            f"it: then each rank reads what it needs."
        )
    if options.mmap:
        raise ConfigError(
            "`mmap=True` has each rank map the files, and `broadcast_from_rank0=True` is for ranks that may not see "
            "them. Give one of the two; ranks of a node that map a file share its memory."
        )
    if options.strict and process.topology.is_main:
        check_doubled(plan.match, view.sources, options.reading)
    return plan


class _Rounds:
    """In each round every reader reads a batch and sends it to all, who take from it what is theirs.

    While a batch travels, the one for the next round is read by a thread. Every rank must make and run it.
    """

    def __init__(
        self,
        process: Process,
        view: _View,
        wanted: Sequence[Source],
        deliveries: Sequence[Delivery],
        progress: Progress,
    ) -> None:
        rank = process.topology.rank
        self._readers = view.readers
        self._own = self._readers.index(rank) if rank in self._readers else None
        self._takers = takers_of(deliveries)
        self._to_open = wanted if self._own is not None else ()
        self._progress = progress
        pieces = (piece for source in wanted for piece in pieces_of(source, view.chunk_bytes))
        self._batches = batches(pieces, view.chunk_bytes)
        # What travels lies where the backend of this world carries it. Two sets: one travels, one is read into.
        size = view.chunk_bytes
        self._sent = torch.empty((2, len(self._readers), size), dtype=torch.uint8, device=process.device)
        self._host: torch.Tensor | None = None
        if process.device.type != "cpu":
            self._host = torch.empty((2, size), dtype=torch.uint8, pin_memory=pins(process.device))
        self._events: list[Any] = [None, None]
        self._failure: Exception | None = None
        self.bytes_read = 0
        """By this rank."""

    def run(self) -> None:
        """Send and take everything. What fails here is kept for `raise_failure`; only collectives raise."""
        with self._opened() as files, ThreadPoolExecutor(1, thread_name_prefix="accel-load") as pool:
            rounds = self._rounds()
            turn = 0
            current = next(rounds, None)
            reading = pool.submit(self._read, files, current, turn)
            while current is not None:
                reading.result()
                following = next(rounds, None)
                self._stage(current, turn)
                reading = pool.submit(self._read, files, following, 1 - turn)
                self._exchange(current, turn)
                current, turn = following, 1 - turn
            reading.result()

    def raise_failure(self) -> None:
        """Raise what failed on this rank, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _opened(self) -> OpenFiles:
        try:
            return OpenFiles.of(self._to_open)
        except OSError as error:
            self._failure = error
            return OpenFiles(())

    def _rounds(self) -> Iterator[list[Batch]]:
        """A batch for each reader; fewer in the last round."""
        while group := list(islice(self._batches, len(self._readers))):
            yield group

    def _read(self, files: OpenFiles, group: list[Batch] | None, turn: int) -> None:
        """In the thread: read this rank's batch of a round."""
        if group is None or self._own is None or self._own >= len(group) or self._failure is not None:
            return
        try:
            if self._events[turn] is not None:
                self._events[turn].synchronize()  # the copy of what was there before
            raw = self._sent[turn, self._own] if self._host is None else self._host[turn]
            for piece, place in group[self._own]:
                files.read(piece, raw[place:])
                self.bytes_read += piece.nbytes
        except _FAILURES as error:
            self._failure = error

    def _stage(self, group: list[Batch], turn: int) -> None:
        """Copy what was read to where it can travel from."""
        if self._host is None or self._own is None or self._own >= len(group):
            return
        self._sent[turn, self._own].copy_(self._host[turn], non_blocking=True)
        event = torch.get_device_module(self._sent.device).Event()
        event.record()
        self._events[turn] = event

    def _exchange(self, group: list[Batch], turn: int) -> None:
        """Every rank must call this. Send all batches of a round, and take from them what is this rank's."""
        works: list[Any] = []
        for number, batch in enumerate(group):
            last, place = batch[-1]
            sent = self._sent[turn, number, : place + last.nbytes]
            works.append(dist.broadcast(sent, src=self._readers[number], async_op=True))
        for work in works:
            work.wait()
        for number, batch in enumerate(group):
            self._take(batch, self._sent[turn, number])
        self._progress.add(sum(piece.nbytes for batch in group for piece, _ in batch))

    def _take(self, batch: Batch, raw: torch.Tensor) -> None:
        try:
            for piece, place in batch:
                for target, values in piece.hand_out(raw[place:], self._takers.get(piece.source, ())):
                    target.copy_(values)
        except _FAILURES as error:
            self._failure = self._failure or error
