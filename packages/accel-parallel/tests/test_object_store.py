"""Objects are read by ranges and put whole, wherever they are, and what goes wrong is said as a disk says it."""

from __future__ import annotations

import builtins
import gc
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from accel_parallel.box import Box
from accel_parallel.checkpoint import Checkpoint, Item, save_checkpoint
from accel_parallel.checkpoint import object_store as store_module
from accel_parallel.checkpoint.folder import CHUNK_BYTES
from accel_parallel.checkpoint.location import as_location, child, is_remote
from accel_parallel.checkpoint.object_store import ObjectStore
from accel_parallel.checkpoint.remote import RemoteFolder, RemoteStaging
from accel_parallel.checkpoint.shelf import shelf_of
from accel_parallel.checkpoint.staging import LocalStaging, staging_of
from accel_state import CheckpointError, ConfigError, MissingDependencyError, Process, ProcessSettings

RUN = "memory://bucket/run"


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    MemoryFileSystem.store.clear()
    with Process.open(ProcessSettings(device="cpu")):
        yield
    MemoryFileSystem.store.clear()


def save(final: str, step: int) -> None:
    item = Item("model", "model", {"weight": torch.full((64,), float(step))})
    save_checkpoint(final, [item], process=Process.current(), step=step, strategy="any")


def saved_step(final: Any) -> int:
    checkpoint = Checkpoint(final)
    assert set(checkpoint.read("model")["weight"].tolist()) == {checkpoint.manifest.step}
    return checkpoint.manifest.step


# Reading and writing


def test_parts_are_read_by_ranges() -> None:
    data = os.urandom(CHUNK_BYTES * 2 + 5)
    folder = RemoteFolder(RUN)
    record = folder.write("large", [data[:10], memoryview(data)[10:]], sync=True)
    assert record.size_bytes == len(data)
    with pytest.raises(FileExistsError, match="is there already"):
        folder.write("large", [], sync=True)
    assert folder.write("empty", [], sync=True).size_bytes == 0
    file = folder.open("large")
    asked: list[tuple[int, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None) -> bytes:
        asked.append((start, end))
        return cat_file(self, path, start=start, end=end)

    with patch.object(MemoryFileSystem, "cat_file", counted):
        for begin in range(0, 4000, 100):
            assert file.view(begin, begin + 100) == data[begin : begin + 100]
        assert asked == [(None, CHUNK_BYTES)]
        assert file.view(5, len(data)) == data[5:]
        assert file.view(len(data) - 3, len(data)) == data[-3:]
        assert file.view(7, 7) == b""
        assert len(asked) == 3
        part = file.view(len(data) - 3, len(data))
        part[0] = part[0] ^ 1  # of this process alone
        assert file.view(len(data) - 3, len(data)) == data[-3:]
    with patch.object(store_module, "BLOCK_BYTES", 1000):
        assert b"".join(file.chunks()) == data
    assert b"".join(folder.open("empty").chunks()) == b""
    ObjectStore(RUN).put("large", b"short")
    with pytest.raises(OSError, match="has changed since it was opened"):
        file.view(1000, CHUNK_BYTES + 1000)


def test_lazy_tensors_fetch_their_rows_only() -> None:
    weight = torch.arange(3 * CHUNK_BYTES // 4).reshape(3, -1).float()
    save_checkpoint(RUN, [Item("model", "model", {"w": weight})], process=Process.current(), step=0, strategy="any")
    stored = Checkpoint(RUN).tensors("model")["w"]
    fetched = 0
    cat_file = MemoryFileSystem.cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None) -> bytes:
        nonlocal fetched
        answer = cat_file(self, path, start=start, end=end)
        fetched += len(answer)
        return answer

    with patch.object(MemoryFileSystem, "cat_file", counted):
        row = stored.read(Box((1, 0), (1, weight.shape[1])))
    assert torch.equal(row, weight[1:2])
    assert fetched <= CHUNK_BYTES


# Names of places


def test_what_is_a_url_and_what_a_path() -> None:
    assert is_remote("s3://bucket/run")
    assert is_remote("S3://bucket/run")
    assert not is_remote("file:///a/run")
    assert not is_remote("a/run")
    assert not is_remote(Path("a/run"))
    assert not is_remote("C:/run")
    assert child("s3://bucket/run/", "x") == "s3://bucket/run/x"
    assert child("file:///a", "x") == Path("/a/x")
    assert as_location("s3://bucket/run/") == "s3://bucket/run"
    assert as_location("a/run/") == Path("a/run")
    assert isinstance(staging_of("file:///a"), LocalStaging)
    with pytest.raises(ConfigError, match=r"`s3:/bucket/run` was given as a `Path`.*begins with `s3://`"):
        staging_of(Path("s3://bucket/run"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://bucket/run", r"`nowhere://bucket/run` names no store .*Give the URL of one that `fsspec` knows"),
        ("memory://", r"names a store and no place in it\. Add one"),
        ("simplecache::memory://run", r"chains several file systems"),
    ],
)
def test_places_that_cannot_be_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectStore(url)


@pytest.mark.parametrize("missing", ["fsspec", "file system"])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    original = builtins.__import__

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "fsspec.core":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    if missing == "fsspec":
        monkeypatch.setattr(builtins, "__import__", import_)
        with pytest.raises(MissingDependencyError, match=r'checkpoints at `s3://b/run`.*"accel-parallel\[remote\]"'):
            staging_of("s3://b/run")
        return
    absent = {"class": "absent.Fs", "err": "Get absent"}
    monkeypatch.setitem(importlib.import_module("fsspec.registry").known_implementations, "absent", absent)
    with pytest.raises(ConfigError, match=r"`absent://b/run` cannot be opened \(Get absent\)\. Install what"):
        staging_of("absent://b/run")


def test_a_store_in_memory_is_known_as_such() -> None:
    assert RemoteStaging(RUN).in_process
    assert not LocalStaging(Path("run")).in_process


def test_writing_to_a_store_needs_no_torch() -> None:
    code = (
        "import sys; from accel_parallel.checkpoint.staging import staging_of; s = staging_of('memory://a/run'); "
        "t = s.begin(1); s.folder(t).write('x', [b'1'], sync=True); s.abandon(t); "
        "from accel_parallel.checkpoint.shelf import shelf_of; shelf_of('memory://a').latest(); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Errors that are no OSError


def test_errors_of_the_libraries_below_are_those_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    class UnreachableError(Exception):
        pass

    library = types.ModuleType("a_library")
    library.UnreachableError = UnreachableError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_library", library)
    monkeypatch.setattr(store_module, "_FOREIGN", (("a_library", "UnreachableError"), ("not_loaded", "Error")))

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnreachableError("no route to host")

    with patch.object(MemoryFileSystem, "find", fail), pytest.raises(CheckpointError, match="bleError: no route"):
        save(RUN, 0)
    with patch.object(MemoryFileSystem, "open", fail), pytest.raises(CheckpointError, match=r"0: OSError: .*no route"):
        save(RUN, 0)
    with patch.object(MemoryFileSystem, "find", fail), pytest.raises(OSError, match="no route to host"):
        shelf_of(RUN).latest()


class Upload(AbstractBufferedFile):
    """An object that goes up in parts, and is there once they are put together."""

    parts: list[bytes] = []  # noqa: RUF012 # of the test below

    def _initiate_upload(self) -> None:
        self.parts.clear()

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.store[self.path] = MemoryFile(data=b"".join(self.parts))
        return True

    def discard(self) -> None:
        self.parts.clear()


def test_an_upload_that_fails_is_thrown_away() -> None:
    def open_(self: MemoryFileSystem, path: str, mode: str, block_size: int) -> Upload:
        return Upload(self, self._strip_protocol(path), mode, block_size=10)

    def broken() -> Iterator[bytes]:
        yield b"x" * 25
        raise OSError("the tensor cannot be read")

    folder = RemoteFolder(RUN)
    with patch.object(MemoryFileSystem, "open", open_):
        assert folder.write("whole", [b"a" * 25, b"b"], sync=True).size_bytes == 26
        with pytest.raises(OSError, match="the tensor cannot be read"):
            folder.write("broken", broken(), sync=True)
        gc.collect()  # of what would be completed by being closed
    assert Upload.parts == []
    assert ObjectStore(RUN).names() == ["whole"]
    assert ObjectStore(RUN).read("whole") == b"a" * 25 + b"b"


def test_objects_that_are_gone_already_count_as_removed() -> None:
    store = ObjectStore(RUN)
    for name in ("a", "b", "c[1]", "c1"):
        store.put(name, b"1")
    store.remove(["a", "gone", "b"])
    assert store.names() == ["c1", "c[1]"]
    store.remove(["c[1]"])  # no pattern
    assert store.names() == ["c1"]
    store.remove([])
