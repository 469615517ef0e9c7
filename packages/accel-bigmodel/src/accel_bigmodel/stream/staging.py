"""What cannot be copied by the device itself, read through pinned buffers by threads of our own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from accel_bigmodel.stream.device import Mark, Transfers
from accel_bigmodel.stream.layout import ALIGNMENT_BYTES
from accel_bigmodel.stream.source import Source

__all__ = ["Staging"]

NUM_BUFFERS = 3
"""One is read into, one is copied from, and one is between."""


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor
    copied: Mark | None = None
    """Behind the last copy from it."""


class Staging:
    """Reads units piece by piece into pinned buffers that are used over and over, and copies each from there.

    One thread orders the pieces, so that units arrive in the order in which they were asked for; several read the parts
    of a piece. All end with this object.

    Args:
        transfers: the device.
        buffer_bytes: size of a piece.
        num_threads: that read at the same time.
    """

    def __init__(self, transfers: Transfers, *, buffer_bytes: int = 32 << 20, num_threads: int = 4) -> None:
        self._transfers = transfers
        self._piece_bytes = max(ALIGNMENT_BYTES, buffer_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
        self._num_threads = num_threads
        self._buffers: list[_Buffer] = []
        self._next = 0
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="accel-feed")
        self._readers = ThreadPoolExecutor(num_threads, thread_name_prefix="accel-read")

    def submit(self, source: Source, destination: torch.Tensor, begin_after: Mark) -> Future[Mark]:
        """Fill `destination`, memory of the device, from `source`, once `begin_after` is passed.

        The result is a mark behind the last copy; it is there when the last piece has been read, or the error is that
        reading raised.
        """
        return self._feeder.submit(self._feed, source, destination, begin_after)

    def close(self) -> None:
        """Wait for what is being read, and end the threads."""
        self._feeder.shutdown(cancel_futures=True)
        self._readers.shutdown()

    def _feed(self, source: Source, destination: torch.Tensor, begin_after: Mark) -> Mark:
        self._transfers.copy_after(begin_after)
        total = source.layout.num_bytes
        for begin in range(0, total, self._piece_bytes):
            size = min(self._piece_bytes, total - begin)
            buffer = self._free_buffer()
            self._read(source, begin, buffer.memory.narrow(0, 0, size))
            self._transfers.copy(destination.narrow(0, begin, size), buffer.memory.narrow(0, 0, size))
            buffer.copied = self._transfers.copied()
        return self._transfers.copied()

    def _free_buffer(self) -> _Buffer:
        if len(self._buffers) < NUM_BUFFERS:
            self._buffers.append(_Buffer(self._transfers.host_bytes(self._piece_bytes)))
            return self._buffers[-1]
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % NUM_BUFFERS
        if buffer.copied is not None:
            self._transfers.host_after(buffer.copied)
        return buffer

    def _read(self, source: Source, begin: int, destination: torch.Tensor) -> None:
        size = destination.numel()
        part = -(-size // self._num_threads)
        part = -(-part // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        reads = [
            self._readers.submit(source.read, begin + first, destination.narrow(0, first, min(part, size - first)))
            for first in range(0, size, part)
        ]
        wait(reads)
        for each in reads:
            each.result()
