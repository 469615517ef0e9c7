"""Checkpoints in an object store, where nothing can be renamed: the commit is one put of the manifest.

Each save writes its files below a name of its own, ``<checkpoint>/files-<time>-<host>-<pid>-<random>/``, so no object
is ever written twice, and the manifest says which of these it means (`Manifest.place`). What it says is replaced by
one put, which takes effect whole or not at all: the commit. What no manifest means is a leftover, and goes when a
later save into the same checkpoint finds that its process is gone, or that it is a day old.

Footguns handled:

- A put that fails may have been done all the same. So files whose manifest was offered are never removed by the save
  that offered it.
- Another save may commit at any time. So what may be removed is first listed, and then asked for what is meant; and
  a save whose files somebody took for leftovers finds them gone and commits nothing.
- Parts of a large object whose writer was killed show in no listing and are paid for. Let the bucket end unfinished
  uploads after some days (for S3, a lifecycle rule with ``AbortIncompleteMultipartUpload``); nothing else can.

Imports no torch: the process that writes in the background has none.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import xxhash

from accel_parallel.checkpoint.folder import CHUNK_BYTES, File, FileRecord, Folder
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, Manifest, placed
from accel_parallel.checkpoint.object_store import BLOCK_BYTES, ObjectStore
from accel_parallel.checkpoint.owner import host_name, lives
from accel_state.errors import CheckpointError

__all__ = ["LEFTOVER_AGE_S", "RemoteFolder", "RemoteStaging", "place_of", "remove_leftovers"]

logger = logging.getLogger(__name__)

LEFTOVER_AGE_S = 24 * 3600.0
"""Age at which files that no manifest means are those of a save that is gone, whatever process wrote them. On another
host there is nothing else to tell by."""
ORPHAN_AGE_S = 600.0
"""The same where their process is known to be gone; what it writes in the background may go on for a while."""

_PLACE = re.compile(r"files-([0-9]+)-(.+)-([0-9]+)-[0-9a-f]{8}")


class RemoteFolder:
    """The objects of one checkpoint, or those below a place in it."""

    def __init__(self, location: str) -> None:
        self._store = ObjectStore(location)

    @property
    def location(self) -> str:
        return self._store.url

    def holds(self, name: str) -> bool:
        return self._store.exists(name)

    def open(self, name: str) -> File:
        if name == MANIFEST_NAME:  # in one request: another may take its place between two
            return _RemoteFile(self._store, name, self._store.read(name))
        return _RemoteFile(self._store, name)

    def below(self, place: str) -> Folder:
        return RemoteFolder(f"{self.location}/{place}")

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, sync: bool) -> FileRecord:
        # A store that has answered keeps an object for good, whatever `sync` asks for.
        if self._store.exists(name):
            raise FileExistsError(f"`{self.location}/{name}` is there already")
        digest, size = xxhash.xxh3_128(), 0
        with self._store.writing(name) as stream:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                for begin in range(0, len(view), CHUNK_BYTES):
                    part = view[begin : begin + CHUNK_BYTES]
                    digest.update(part)
                    size += len(part)
                    stream.write(part)
        return FileRecord(size, digest.hexdigest())


class _RemoteFile:
    def __init__(self, store: ObjectStore, name: str, whole: bytes | None = None) -> None:
        self._store, self._name = store, name
        self.size_bytes = store.size_bytes(name) if whole is None else len(whole)
        self._ahead: tuple[int, bytes] = (0, whole or b"")
        """Where what was fetched last begins, and that: neighbours are asked for next, and often small."""

    def view(self, begin: int, end: int) -> memoryview:
        if begin >= end:
            return memoryview(bytearray())
        first, data = self._ahead
        if not first <= begin <= end <= first + len(data):
            first, data = begin, self._fetch(begin, max(end, min(self.size_bytes, begin + CHUNK_BYTES)))
            if len(data) <= CHUNK_BYTES:
                self._ahead = (first, data)
        return memoryview(bytearray(memoryview(data)[begin - first : end - first]))

    def chunks(self) -> Iterator[memoryview]:
        for begin in range(0, self.size_bytes, BLOCK_BYTES):
            yield memoryview(self._fetch(begin, min(self.size_bytes, begin + BLOCK_BYTES)))

    def _fetch(self, begin: int, end: int) -> bytes:
        data = self._store.read(self._name, begin, end)
        if len(data) != end - begin:
            raise OSError(
                f"`{self._store.url}/{self._name}` gave {len(data)} bytes instead of {end - begin} from {begin} on: it "
                f"has changed since it was opened"
            )
        return data


class RemoteStaging:
    """Where the files of a new checkpoint gather: below a name of its own, in the checkpoint."""

    def __init__(self, final: str) -> None:
        self._store = ObjectStore(final)
        self._offered: set[str] = set()
        """Tokens that a manifest was put for, though perhaps in vain."""

    @property
    def location(self) -> str:
        return self._store.url

    @property
    def in_process(self) -> bool:
        """Whether no other process would see the checkpoint."""
        return self._store.in_process

    def begin(self, pid: int) -> str:
        names = self._store.names()
        foreign = [name for name in names if place_of(name) is None]
        if foreign and MANIFEST_NAME not in foreign:
            raise CheckpointError(
                f"`{self.location}` holds {_few(foreign)} and is no checkpoint, and loading one from there could take "
                f"these for a part of it. Name another place."
            )
        try:
            remove_leftovers(self._store, names)
        except (OSError, CheckpointError) as error:
            logger.warning("What saves that are gone left in %s could not be removed (%s).", self.location, error)
        return f"{self.location}/files-{int(time.time())}-{_plain_host()}-{pid}-{secrets.token_hex(4)}"

    def folder(self, token: str) -> Folder:
        return RemoteFolder(token)

    def hold(self, token: str) -> AbstractContextManager[None]:
        return nullcontext()  # what a dead run left stays for a while anyway

    def remove(self, token: str, name: str) -> None:
        self._store.remove([f"{_place(token)}/{name}"])

    def publish(self, token: str, manifest: str, *, sync: bool) -> None:
        text = placed(manifest, _place(token))
        present = set(self._store.names())
        missing = [name for name in json.loads(text)["files"] if f"{_place(token)}/{name}" not in present]
        if missing:
            raise CheckpointError(
                f"{_few(missing)} of `{self.location}` went before it was complete: another save took it for a "
                f"leftover. Save again, and let each run have a place of its own."
            )
        try:
            replaced = _objects(_meant(self._store))
        except CheckpointError:  # not known what it means: in a day, that is a leftover
            replaced = []
        self._offered.add(token)
        self._store.put(MANIFEST_NAME, text.encode(), beside=f"{_place(token)}/{MANIFEST_NAME}")
        self._remove(replaced)

    def abandon(self, token: str) -> None:
        if token in self._offered:
            return
        try:
            meant = _meant(self._store)
            if meant is None or meant.place != _place(token):
                self._remove([name for name in self._store.names() if place_of(name) == _place(token)])
        except (OSError, CheckpointError) as error:
            logger.warning("What was written of %s was left there (%s).", self.location, error)

    def _remove(self, names: list[str]) -> None:
        """Not worth failing for: what stays is a leftover, which a later save removes."""
        try:
            self._store.remove(names)
        except OSError as error:
            logger.warning("Objects of %s could not be removed (%s); a later save tries again.", self.location, error)


def place_of(name: str) -> str | None:
    """The place that an object of a checkpoint lies below; ``None`` for the manifest and what is no part of it."""
    place, slash, _ = name.partition("/")
    return place if slash and _PLACE.fullmatch(place) else None


def remove_leftovers(store: ObjectStore, names: Iterable[str]) -> None:
    """Remove what saves into a checkpoint left whose process is gone.

    Args:
        store: the checkpoint.
        names: its objects, listed before this is called.

    Raises:
        CheckpointError: if its manifest cannot be read, so that it is not known what may go.
        OSError: whatever the store says.
    """
    names = list(names)
    gone = {place for name in names if (place := place_of(name)) is not None and _is_gone(place)}
    if not gone:
        return
    meant = _meant(store)
    if meant is not None:
        gone.discard(meant.place)
    store.remove([name for name in names if place_of(name) in gone])


def _is_gone(place: str) -> bool:
    match = _PLACE.fullmatch(place)
    assert match is not None
    age_s = time.time() - int(match[1])
    is_orphan = match[2] == _plain_host() and not lives(int(match[3]))
    return age_s > (ORPHAN_AGE_S if is_orphan else LEFTOVER_AGE_S)


def _plain_host() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", host_name())


def _meant(store: ObjectStore) -> Manifest | None:
    """The manifest that is there.

    Raises:
        CheckpointError: if it cannot be read.
        OSError: if it is not known whether there is one.
    """
    return Manifest.read(RemoteFolder(store.url)) if store.exists(MANIFEST_NAME) else None


def _objects(manifest: Manifest | None) -> list[str]:
    """Names of those that a manifest means. Without a place it is a folder that somebody has uploaded."""
    if manifest is None:
        return []
    names = [f"{manifest.place}/{name}" if manifest.place else name for name in manifest.files]
    return [name for name in names if name != MANIFEST_NAME]


def _place(token: str) -> str:
    return token.rpartition("/")[2]


def _few(names: list[str]) -> str:
    return ", ".join(name or "an object of that very name" for name in names[:3]) + (", ..." if len(names) > 3 else "")
