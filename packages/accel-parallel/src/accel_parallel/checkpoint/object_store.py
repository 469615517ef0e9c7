"""The objects below one URL: read in ranges, put whole, listed, removed. What goes wrong is an `OSError`.

Anything that `fsspec` has a file system for; which store, and with whose credentials, is configured there
(https://filesystem-spec.readthedocs.io). Object stores let a put take effect whole or not at all, and are consistent
afterwards (S3 since 2020). On anything else an object is put beside its name and moved there.

Imports no torch, and `fsspec` when a store is opened.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any
from uuid import uuid4

from accel_parallel.checkpoint.location import as_location
from accel_state.errors import ConfigError, MissingDependencyError

__all__ = ["BLOCK_BYTES", "ObjectStore"]

BLOCK_BYTES = 1 << 24
"""What one request carries of a large object, up or down."""

_PUTS_WHOLE = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "tos", "cos"})
"""Protocols where a reader sees all of a new object or all of the old one."""

_FOREIGN = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("paramiko.ssh_exception", "SSHException"),
    ("asyncio", "TimeoutError"),
)
"""What libraries below `fsspec` raise that is no `OSError`."""


class ObjectStore:
    """The objects whose names begin with one URL and a slash."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            ConfigError: if nothing is known of such URLs, or it names no place in its store.
            MissingDependencyError: if what opens them is not installed.
        """
        self.url = str(as_location(url))
        self._fs, self._root = _open(self.url)
        self._protocol = url.partition("://")[0].lower()

    @property
    def in_process(self) -> bool:
        """Whether it is gone with this process, and no other sees it."""
        return self._protocol == "memory"

    def exists(self, name: str) -> bool:
        """Whether there is such an object, or others below that name."""
        try:
            self._info(name)
        except FileNotFoundError:
            return False
        return True

    def size_bytes(self, name: str) -> int:
        """
        Raises:
            FileNotFoundError: if there is no such object.
            OSError: if it is none itself but others lie below it, or the store fails.
        """
        info = self._info(name)
        if info["type"] != "file":
            raise IsADirectoryError(f"`{self.url}/{name}` is not a plain object")
        return int(info["size"])

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """The bytes of an object from `begin` to `end`.

        Raises:
            FileNotFoundError: if there is no such object.
            OSError: whatever the store says.
        """
        with self._translated(name):
            return bytes(self._fs.cat_file(self._path(name), start=begin or None, end=end))

    def put(self, name: str, data: bytes, *, beside: str | None = None) -> None:
        """Make an object of these bytes, or let it have them: at once, or not at all.

        Args:
            name: of the object.
            data: its bytes.
            beside: a name to put it under first, where only moving it is whole.

        Raises:
            OSError: whatever the store says. It may have done it all the same.
        """
        with self._translated(name):
            if self._protocol in _PUTS_WHOLE:
                self._fs.pipe_file(self._path(name), data)
                return
            first = self._path(beside or f"{name}.{uuid4().hex}")
            self._make_parent(name)
            try:
                self._fs.pipe_file(first, data)
                self._fs.mv(first, self._path(name))
            finally:
                with suppress(FileNotFoundError):  # it was moved
                    self._fs.rm_file(first)

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A stream that becomes an object when the block ends, and nothing where it is left by an error."""
        with self._translated(name):
            if self._protocol not in _PUTS_WHOLE:
                self._make_parent(name)
            stream = self._fs.open(self._path(name), "wb", block_size=BLOCK_BYTES)
            finished = False
            try:
                yield stream
                stream.close()
                finished = True
            finally:
                if not finished:
                    self._throw_away(stream, name)

    def names(self) -> list[str]:
        """Every object, by its name below the URL; `""` stands for one that is the URL itself.

        Empty objects that stand for folders, as consoles make them, are left out.
        """
        with self._translated(""):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root)
            except FileNotFoundError:
                return []
        return sorted(
            path[len(self._root) + 1 :]
            for path in found
            if path == self._root or (path.startswith(f"{self._root}/") and not path.endswith("/"))
        )

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already count as removed.

        Raises:
            OSError: whatever the store says; some may be gone then.
        """
        names = list(names)
        paths = [self._path(name) for name in names]
        with self._translated(""):
            if paths and self._protocol in _PUTS_WHOLE and not any(has_magic(path) for path in paths):
                with suppress(FileNotFoundError):  # by somebody else, of which then is not known
                    self._fs.rm(paths)  # one request for a thousand
                    return
            for path in paths:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)
            if self._protocol not in _PUTS_WHOLE:
                self._remove_folders(names)

    def _remove_folders(self, names: Iterable[str]) -> None:
        folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
        for folder in sorted(folders - {"."}, key=len, reverse=True):
            with suppress(OSError):  # something else lies there
                self._fs.rmdir(self._path(folder))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _info(self, name: str) -> Any:
        with self._translated(name):
            self._fs.invalidate_cache()  # of what was listed before others wrote
            return self._fs.info(self._path(name))

    def _make_parent(self, name: str) -> None:
        self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _throw_away(self, stream: Any, name: str) -> None:
        """End a stream so that what was written does not become an object, nor stays as parts of one."""
        from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped,unused-ignore]

        with suppress(OSError):
            if isinstance(stream, AbstractBufferedFile):
                stream.discard()
                stream.closed = True  # closing, also by the garbage collector, would complete it
                return
            stream.close()
            self._fs.rm_file(self._path(name))

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except _foreign_errors() as error:
            where = f"{self.url}/{name}" if name else self.url
            raise OSError(f"`{where}`: {type(error).__name__}: {error}") from error


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Those whose libraries are loaded; no other can have raised anything."""
    found = [getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules]
    return tuple(error for error in found if not issubclass(error, OSError))


def _open(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependencyError(
            "fsspec", purpose=f"checkpoints at `{url}`", install='pip install "accel-parallel[remote]"'
        ) from error
    if "::" in url:
        raise ConfigError(
            f"`{url}` chains several file systems, and whether what one of them has written is in the next is not "
            f"known. Give the URL of the store itself."
        )
    protocol = url.partition("://")[0]
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(
            f"`{url}` cannot be opened ({error}). Install what `fsspec` needs for `{protocol}://`, such as s3fs for "
            f"s3, gcsfs for gs, adlfs for az."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"`{url}` names no store ({error}). Give the URL of one that `fsspec` knows, such as s3://bucket/run, or "
            f"a path."
        ) from error
    root = str(root).rstrip("/")
    if not root:
        raise ConfigError(f"`{url}` names a store and no place in it. Add one, as in `{protocol}://bucket/run`.")
    return fs, root
