"""Threads that read files in parallel, each into memory of its own that is copied on while the next is read.

What goes to the CPU in the dtype in which it is stored is read right into its memory. All else takes the way over two
small staging buffers a thread, pinned where an accelerator is the target.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from accel_bigmodel.loading.delivery import Delivery, OpenFiles, Piece, ReadSettings, batches, pieces_of
from accel_bigmodel.loading.lane import Lane, lane_for, pins
from accel_bigmodel.loading.progress import Progress
from accel_bigmodel.loading.source import Source
from accel_bigmodel.stored import StoredTensor

__all__ = ["deliver", "takers_of"]

NUM_BUFFERS = 2
"""Of each thread: one is copied from while the other is read into."""

Work = tuple[torch.device, list[tuple[Piece, int]]]


def deliver(
    deliveries: Sequence[Delivery],
    settings: ReadSettings,
    *,
    progress: Progress,
    make_lane: Callable[[torch.device], Lane] = lane_for,
) -> int:
    """Read everything and return when all of it is where it goes. Returns the bytes that were read.

    Raises:
        CheckpointError: if a file was cut short.
        OSError: if one cannot be read.
    """
    takers = takers_of(deliveries)
    with OpenFiles.of(takers) as files:
        crew = _Crew(takers, files, settings, progress, make_lane)
        num_threads = min(settings.resolve_threads(), max(1, crew.num_bytes // settings.chunk_bytes))
        with ThreadPoolExecutor(num_threads, thread_name_prefix="accel-load") as pool:
            try:
                for future in [pool.submit(crew.work) for _ in range(num_threads)]:
                    future.result()
            except BaseException:
                crew.stop()  # Ctrl-C too: the threads are waited for, and should not read all that is left
                raise
    return progress.done_bytes


def takers_of(deliveries: Iterable[Delivery]) -> dict[Source, list[Delivery]]:
    """Who takes what of each stored tensor, in the order of the files."""
    found: dict[Source, list[Delivery]] = defaultdict(list)
    for each in deliveries:
        found[each.source].append(each)
    return dict(sorted(found.items(), key=lambda pair: _where(pair[0])))


def _where(source: Source) -> tuple[str, int]:
    if isinstance(source, StoredTensor):
        return str(source.path), source.offset
    return str(source.path), int(source.tensor.storage_offset())


class _Crew:
    """What the threads of one load share."""

    def __init__(
        self,
        takers: dict[Source, list[Delivery]],
        files: OpenFiles,
        settings: ReadSettings,
        progress: Progress,
        make_lane: Callable[[torch.device], Lane],
    ) -> None:
        self._takers = takers
        self._files = files
        self._settings = settings
        self._progress = progress
        self._make_lane = make_lane
        self._lock = threading.Lock()
        self._failed = False
        self._work = self._all_work()
        self.num_bytes = sum(source.nbytes for source in takers)

    def _all_work(self) -> Iterator[Work]:
        """Batches, each for one device."""
        limit = self._settings.chunk_bytes
        devices = {each.target.device for takers in self._takers.values() for each in takers}
        for device in sorted(devices, key=str):
            pieces = (
                piece
                for source, takers in self._takers.items()
                if takers[0].target.device == device
                for piece in pieces_of(source, limit, takers)
            )
            for batch in batches(pieces, limit):
                yield device, batch

    def _next(self) -> Work | None:
        with self._lock:
            return None if self._failed else next(self._work, None)

    def stop(self) -> None:
        """Begin nothing more."""
        self._failed = True

    def work(self) -> None:
        """One thread's share: until nothing is left, or another thread has failed."""
        staging = _Staging(self._settings.chunk_bytes, self._make_lane)
        try:
            while (found := self._next()) is not None:
                self._do(*found, staging)
            staging.finish()
        except BaseException:
            self._failed = True
            raise

    def _do(self, device: torch.device, batch: list[tuple[Piece, int]], staging: _Staging) -> None:
        staged = []
        for piece, place in batch:
            target = self._in_place(piece, device)
            if target is None:
                staged.append((piece, place))
            else:
                self._files.read(piece, target)
        if staged:
            raw = staging.free_buffer(device)
            pairs = []
            for piece, place in staged:
                self._files.read(piece, raw[place:])
                pairs += piece.hand_out(raw[place:], self._takers[piece.source])
            staging.send(device, pairs)
        self._progress.add(sum(piece.nbytes for piece, _ in batch))

    def _in_place(self, piece: Piece, device: torch.device) -> torch.Tensor | None:
        """The memory of the one who takes all of the piece, as bytes, if it can be read right there."""
        takers = self._takers[piece.source]
        if device.type != "cpu" or len(takers) > 1 or takers[0].target.dtype != piece.source.dtype:
            return None
        if takers[0].common(piece) != piece.box:
            return None
        target = takers[0].target_of(piece.box)
        return target.reshape(-1).view(torch.uint8) if target.is_contiguous() else None


class _Staging:
    """One thread's buffers, and what it waits for before it fills one again."""

    def __init__(self, chunk_bytes: int, make_lane: Callable[[torch.device], Lane]) -> None:
        self._chunk_bytes = chunk_bytes
        self._make_lane = make_lane
        self._lanes: dict[torch.device, Lane] = {}
        self._buffers: list[tuple[torch.Tensor, tuple[Lane, Any] | None]] = []
        self._turn = 0

    def free_buffer(self, device: torch.device) -> torch.Tensor:
        """Bytes that nobody copies from any more."""
        if len(self._buffers) < NUM_BUFFERS:
            self._buffers.append((torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=pins(device)), None))
            self._turn = len(self._buffers) - 1
        else:
            self._turn = (self._turn + 1) % NUM_BUFFERS
        raw, pending = self._buffers[self._turn]
        if pending is not None:
            pending[0].wait(pending[1])
        if pins(device) and not raw.is_pinned():  # it was made for another kind of device
            raw = torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=True)
        self._buffers[self._turn] = (raw, None)
        return raw

    def send(self, device: torch.device, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy from the buffer that was given out last."""
        lane = self._lanes.get(device) or self._lanes.setdefault(device, self._make_lane(device))
        self._buffers[self._turn] = (self._buffers[self._turn][0], (lane, lane.copy(pairs)))

    def finish(self) -> None:
        """Return when everything has arrived."""
        for _, pending in self._buffers:
            if pending is not None:
                pending[0].wait(pending[1])
