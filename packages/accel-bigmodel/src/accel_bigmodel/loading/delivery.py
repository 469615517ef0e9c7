"""What the engine is told to do: which part of a stored tensor goes where, and in which units it is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from accel_bigmodel.loading.box import Box, cut, index_of, meet, offset_of, shape_of, whole
from accel_bigmodel.loading.source import Source
from accel_bigmodel.stored import StoredTensor, read_bytes
from accel_state.errors import ConfigError

__all__ = ["Delivery", "OpenFiles", "Piece", "ReadSettings", "batches", "pieces_of", "whole_of"]

ALIGNMENT = 64
"""Bytes; pieces begin at multiples of it in a staging buffer, so that each can be seen as its dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """How files are read."""

    num_threads: int | None = None
    """Threads that read at once; ``None``: one for each processor that this process may use, at most 16."""
    chunk_bytes: int = 8 << 20
    """Most that is read at once. Each thread has two staging buffers of this size where values go to an accelerator or
    are converted."""
    large_pages: bool = False
    """Whether new memory of the CPU is asked for in large pages, where the system gives such when asked. They cost far
    fewer faults, so loading is faster where memory is at hand; on virtual machines that give free memory back to their
    host it is slower. Nothing changes for what goes to an accelerator, or has memory already."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(
                f"`num_threads={self.num_threads}` leaves nobody to read. Give a positive number, or `None`."
            )
        if self.chunk_bytes < 4096:
            raise ConfigError(
                f"`chunk_bytes={self.chunk_bytes}` is less than a page of memory, and each chunk costs a call. Give "
                f"at least 4096; 8388608 is the default."
            )

    def resolve_threads(self) -> int:
        """The number of threads."""
        if self.num_threads is not None:
            return self.num_threads
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return min(16, max(2, len(allowed)))  # one waits for the disk or for a device while another copies


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """A part of a stored tensor, and the memory that takes it."""

    source: Source
    box: Box
    """Which part."""
    target: torch.Tensor
    """Memory of that shape, without a gradient; of any dtype, device and strides."""

    def common(self, piece: Piece) -> Box | None:
        """What it takes of a piece, ``None`` if that is nothing."""
        return meet(piece.box, self.box)

    def target_of(self, common: Box) -> torch.Tensor:
        """The memory that takes it."""
        return self.target[index_of(common, self.box)]


def whole_of(source: Source, target: torch.Tensor) -> Delivery:
    """All of a stored tensor, to memory of its shape."""
    return Delivery(source, whole(source.shape), target)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a stored tensor that lies in one piece in its file."""

    source: Source
    box: Box

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(shape_of(self.box)) * self.source.dtype.itemsize

    def view(self, raw: torch.Tensor) -> torch.Tensor:
        """The values that lie in bytes."""
        return raw[: self.nbytes].view(self.source.dtype).view(shape_of(self.box))

    def hand_out(self, raw: torch.Tensor, takers: Iterable[Delivery]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Memory of each taker, and which of the values that lie in `raw` it takes."""
        values = self.view(raw)
        found = [(each, common) for each in takers if (common := each.common(self)) is not None]
        return [(each.target_of(common), values[index_of(common, self.box)]) for each, common in found]


def pieces_of(source: Source, limit_bytes: int, takers: Sequence[Delivery] | None = None) -> Iterator[Piece]:
    """`source` in pieces of at most so many bytes.

    Args:
        source: what is read.
        limit_bytes: at least the size of an element.
        takers: who takes it; rows outside those that they want are left out. Without, all of it.
    """
    if 0 in source.shape:
        return
    rows = None
    if takers and source.shape:
        wanted = [each.box[0] for each in takers]
        rows = (min(begin for begin, _ in wanted), max(end for _, end in wanted))
    for box in cut(source.shape, limit_bytes // source.dtype.itemsize, rows):
        piece = Piece(source, box)
        if takers is None or any(each.common(piece) is not None for each in takers):
            yield piece


def batches(pieces: Iterable[Piece], limit_bytes: int) -> Iterator[list[tuple[Piece, int]]]:
    """Pieces with their place in a staging buffer of `limit_bytes`, as many as it holds."""
    batch: list[tuple[Piece, int]] = []
    end = 0
    for piece in pieces:
        if batch and end + piece.nbytes > limit_bytes:
            yield batch
            batch, end = [], 0
        batch.append((piece, end))
        end += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    if batch:
        yield batch


class OpenFiles:
    """Files that are read from, each opened once. Several threads may read at once.

    Args:
        paths: of the files.

    Raises:
        OSError: if one cannot be opened; none is left open then.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        with ExitStack() as stack:
            self._descriptors: dict[Path, int] = {}
            for path in sorted(set(paths)):
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, self._descriptors[path])
            self._stack = stack.pop_all()

    @staticmethod
    def of(sources: Iterable[Source]) -> OpenFiles:
        """Those that `sources` need open."""
        return OpenFiles(each.path for each in sources if isinstance(each, StoredTensor))

    def read(self, piece: Piece, raw: torch.Tensor) -> None:
        """Fill bytes on the CPU, as many as the piece has.

        Raises:
            CheckpointError: if the file was cut short.
            OSError: if it cannot be read.
        """
        source = piece.source
        if isinstance(source, StoredTensor):
            begin = offset_of(piece.box, source.shape) * source.dtype.itemsize
            read_bytes(self._descriptors[source.path], source, raw[: piece.nbytes], begin=begin)
        else:
            piece.view(raw).copy_(source.tensor[tuple(slice(*each) for each in piece.box)])

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
