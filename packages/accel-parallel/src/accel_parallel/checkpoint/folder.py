"""Where files of a checkpoint are: a folder of this machine's file system, or of an object store.

Imports no torch: the process that writes in the background has none.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

__all__ = ["CHUNK_BYTES", "File", "FileRecord", "Folder", "LocalFolder", "sync_to_disk"]

CHUNK_BYTES = 1 << 22
"""What is read or written at once: large enough for a disk, small enough to hash while it is in the cache."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file."""

    size_bytes: int
    xxh3_128: str
    """XXH3-128 of its bytes, as hexadecimal (https://github.com/Cyan4973/xxHash): finds damage, not malice."""


class File(Protocol):
    """A file that is being read."""

    @property
    def size_bytes(self) -> int: ...

    def view(self, begin: int, end: int) -> memoryview:
        """Its bytes from `begin` to `end`, writable; what is written there stays in this process."""

    def chunks(self) -> Iterator[memoryview]:
        """All of it, once, in pieces that are only good until the next one."""


class Folder(Protocol):
    """A folder that holds one checkpoint, or is to."""

    @property
    def location(self) -> str:
        """As a user writes it."""

    def holds(self, name: str) -> bool:
        """Whether there is anything of that name."""

    def open(self, name: str) -> File:
        """
        Raises:
            OSError: if there is no such file, or it is none: a link may lead out of the folder.
        """

    def below(self, place: str) -> Folder:
        """The folder of that name in it, where a manifest may say that files are.

        Raises:
            OSError: if it is a link, which may lead out of the folder.
        """

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, sync: bool) -> FileRecord:
        """Make a file of these bytes, on the disk for good when this returns and `sync`.

        Raises:
            OSError: whatever the disk says, such as being full, or that there is such a file already.
        """


class LocalFolder:
    """A folder of a file system that this machine has mounted."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def location(self) -> str:
        return str(self.path)

    def holds(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def open(self, name: str) -> File:
        return _LocalFile(self.path / name)

    def below(self, place: str) -> Folder:
        if (self.path / place).is_symlink():
            raise OSError(f"`{self.path / place}` is a link")
        return LocalFolder(self.path / place)

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, sync: bool) -> FileRecord:
        digest, size = xxhash.xxh3_128(), 0
        descriptor = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                for part in _cut(memoryview(chunk).cast("B")):
                    digest.update(part)
                    size += len(part)
                    while part:
                        part = part[os.write(descriptor, part) :]
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return FileRecord(size, digest.hexdigest())


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        # O_NONBLOCK: opening a pipe that somebody put there would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"`{path}` is not a plain file")
            self.size_bytes = found.st_size
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) if self.size_bytes else None
        finally:
            os.close(descriptor)

    def view(self, begin: int, end: int) -> memoryview:
        return memoryview(self._map)[begin:end] if self._map is not None else memoryview(bytearray())

    def chunks(self) -> Iterator[memoryview]:
        # Read and not mapped: a disk that fails answers with an error then, not with a signal.
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, self.size_bytes))))
        with self._path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                yield buffer[:count]


def sync_to_disk(path: Path) -> None:
    """Ask the system to put a folder's list of names on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut(view: memoryview) -> Iterator[memoryview]:
    for begin in range(0, len(view), CHUNK_BYTES):
        yield view[begin : begin + CHUNK_BYTES]
