"""Tensors that stay on disk but are not stored as they are needed: written once, in the dtype that is wanted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from accel_bigmodel.loading.source import Source
from accel_bigmodel.sizes import format_bytes
from accel_bigmodel.stored import StoredTensor, read_file_header
from accel_state.errors import CheckpointError, ConfigError
from accel_state.tensor_format import TensorShape, file_header, name_of_dtype, order_in_file

__all__ = ["ConvertedFile", "converted_name"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def converted_name(wanted: Mapping[str, tuple[TensorShape, Sequence[Source]]]) -> str:
    """Name of the file that holds these tensors made of these stored ones; another one for anything else."""
    digest = hashlib.sha256()
    for name, (shape, sources) in sorted(wanted.items()):
        digest.update(f"{name} {shape.dtype} {shape.shape}\n".encode())
        for each in sources:
            found = each.path.stat()
            path = each.path.resolve()
            digest.update(f"{path} {each.name} {found.st_ino} {found.st_size} {found.st_mtime_ns}\n".encode())
    return f"converted-{digest.hexdigest()[:16]}.safetensors"


class ConvertedFile:
    """A safetensors file whose tensors are filled in memory that is the file's.

    It has its name only once `commit` was called; a context manager that leaves nothing behind otherwise.

    Args:
        path: its name. Its folder is made.
        tensors: what it is to hold.

    Raises:
        CheckpointError: if the disk has no room for it.
        ConfigError: if the format has no such dtype.
        OSError: if it cannot be made.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorShape]) -> None:
        for name, shape in tensors.items():
            if name_of_dtype(shape.dtype) is None:
                raise ConfigError(
                    f"`{name}` is to stay on disk as {shape.dtype}, which safetensors files cannot hold. Give another "
                    f"`dtype`, or map it to a device."
                )
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        header = file_header(tensors)
        self._size = len(header) + sum(each.nbytes for each in tensors.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.callback(self._temporary.unlink, missing_ok=True)
            self._map = self._reserve(header)
            stack.pop_all()
        self._tensors = _views(self._map, tensors, len(header))

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What is to be filled."""
        return self._tensors

    def _reserve(self, header: bytes) -> mmap.mmap:
        """All of the file's blocks, so that a full disk is told here and not by a signal when a page is written."""
        try:
            free = shutil.disk_usage(self.path.parent).free
            if free < self._size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, self._size)
                else:
                    os.ftruncate(descriptor, self._size)
                os.pwrite(descriptor, header, 0)
                return mmap.mmap(descriptor, self._size)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"`{self.path.parent}` is to take {format_bytes(self._size)} of weights that are to be on disk and are in "
            f"no file as they are needed, and has no room for them ({error.strerror}; "
            f"{format_bytes(shutil.disk_usage(self.path.parent).free)} are free). Free some, give a folder on another "
            f"disk, or use a checkpoint in safetensors in the dtype that is stored (`dtype='auto'`): then nothing is "
            f"written."
        )

    def commit(self) -> dict[str, StoredTensor]:
        """Write it out, give it its name, and say where its tensors are.

        Raises:
            CheckpointError: if the disk is full.
            OSError: if it cannot be written.
        """
        try:
            self._map.flush()
            os.replace(self._temporary, self.path)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise self._explained(error) from error
        return read_file_header(self.path)

    def __enter__(self) -> ConvertedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}  # lets go of the map, which has no further owner
        del self._map
        self._temporary.unlink(missing_ok=True)


def _views(pages: mmap.mmap, tensors: Mapping[str, TensorShape], begin: int) -> dict[str, torch.Tensor]:
    found = {}
    for name in order_in_file(tensors):
        shape = tensors[name]
        if shape.nbytes:
            raw = torch.frombuffer(pages, dtype=torch.uint8, offset=begin, count=shape.nbytes)
            found[name] = raw.view(shape.dtype).view(shape.shape)
        else:
            found[name] = torch.empty(shape.shape, dtype=shape.dtype)
        begin += shape.nbytes
    return found
