"""Folders that `torch.distributed.checkpoint` wrote.

``.metadata`` is a pickle of records that say which part of which tensor lies where in files named ``*.distcp``; each
part is what `torch.save` writes (torch/distributed/checkpoint/metadata.py and filesystem.py). torch itself reads that
pickle without restraint. Here it is read as data, by `opcodes`, and each part with ``weights_only=True``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from accel_parallel.checkpoint.folder import LocalFolder
from accel_parallel.checkpoint.tensor_file import StoredTensor, TensorFile
from accel_parallel.checkpoint_commands.convert.foreign import load_bytes
from accel_parallel.checkpoint_commands.convert.opcodes import Record, read_pickle
from accel_state.errors import CheckpointError
from accel_state.tensor_format import TensorShape

__all__ = ["METADATA", "DistributedCheckpoint"]

METADATA = ".metadata"
_WRITTEN = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of a tensor, or one other value."""

    offsets: tuple[int, ...]
    file: str
    begin: int
    end: int


class _Parts(TensorFile):
    """Tensors put together from their parts when they are asked for, one at a time."""

    def __init__(self, folder: Path, entries: Mapping[str, TensorShape], parts: Mapping[str, list[_Part]]) -> None:
        # Not the constructor of a file: there is no one file, and no header.
        self.location = str(folder)
        self.entries = {name: (shape, 0) for name, shape in entries.items()}
        self._folder = LocalFolder(folder)
        self._parts = parts

    def view(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        shape, dtype = self.entries[name][0]
        whole = torch.empty(shape, dtype=dtype)
        filled = 0
        for part in self._parts[name]:
            read = self.value(name, part)
            if not isinstance(read, torch.Tensor) or read.dtype != dtype or read.dim() != len(shape):
                raise self._damaged(name, f"a part of it is no {dtype} of {len(shape)} dims")
            box = tuple(slice(begin, begin + size) for begin, size in zip(part.offsets, read.shape, strict=True))
            if whole[box].shape != read.shape:
                raise self._damaged(name, "a part of it lies outside")
            whole[box] = read
            filled += read.numel()
        if filled != prod(shape):
            raise self._damaged(name, f"its parts hold {filled} of {prod(shape)} values")
        return whole[rows] if shape else whole

    def value(self, name: str, part: _Part) -> Any:
        """What one part holds."""
        try:
            file = self._folder.open(part.file)
        except OSError as error:
            raise self._damaged(name, f"{part.file} could not be read: {error}") from error
        if not 0 <= part.begin <= part.end <= file.size_bytes:
            raise self._damaged(name, f"{part.file} is shorter than {METADATA} says")
        return load_bytes(file.view(part.begin, part.end), f"{self.location}/{part.file} of {name}")

    def _damaged(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"`{name}` in `{self.location}` is damaged: {problem}. Restore it, then convert again.")


class DistributedCheckpoint:
    """Such a folder: tensors by their path, not read yet, and other values."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: if its description cannot be read, or names files outside of it.
        """
        self.folder = folder
        path = folder / METADATA
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"`{path}` could not be read ({error}). Name the folder that holds it.") from error
        try:
            self._read(read_pickle(content, str(path)))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"`{path}` does not describe a checkpoint as torch.distributed.checkpoint does ({error!r}). Restore "
                f"it, or convert with the torch that wrote it."
            ) from error

    def _read(self, metadata: Any) -> None:
        attributes = metadata.state
        parts: dict[str, list[_Part]] = {}
        for index, info in attributes["storage_data"].items():
            name, part = _part(index, info)
            parts.setdefault(name, []).append(part)
        shapes = {}
        for name, entry in attributes["state_dict_metadata"].items():
            if _kind(entry) == "TensorStorageMetadata":
                shapes[name] = TensorShape(_sizes(entry.state["size"]), _dtype(entry.state["properties"]))
        planned = attributes.get("planner_data")
        self.paths: dict[str, tuple[Any, ...]] = {
            name: tuple(planned[name]) if isinstance(planned, dict) and name in planned else (name,)
            for name in attributes["state_dict_metadata"]
        }
        """Where each entry was in the nested dict that was saved."""
        self._parts = parts
        self._file = _Parts(folder=self.folder, entries=shapes, parts=parts)

    @property
    def num_ranks(self) -> int:
        """How many processes wrote files."""
        files = {part.file for parts in self._parts.values() for part in parts}
        return max(1, len({found[1] for file in files if (found := _WRITTEN.fullmatch(file))}))

    @property
    def keys(self) -> dict[str, bool]:
        """Keys of the outermost dict, and whether there is a dict or a list under each."""
        found: dict[str, bool] = {}
        for path in self.paths.values():
            found[path[0]] = found.get(path[0], False) or len(path) > 1
        return found

    def tensors(self, key: str | None) -> tuple[dict[str, StoredTensor], list[str]]:
        """Tensors under a key by the rest of their path, those of the outermost dict without one; and what is none."""
        tensors, others = {}, []
        for name, path in self.paths.items():
            inner = path[1:] if key is not None and path[0] == key else path if key is None and len(path) == 1 else ()
            if inner and name in self._file.entries:
                tensors[".".join(str(each) for each in inner)] = self._stored(name)
            elif inner:
                others.append(name)
        return tensors, others

    def tree(self, key: str) -> Any:
        """What was saved under a key; tensors lazy.

        Raises:
            CheckpointError: if a value beside the tensors cannot be read.
        """
        root: dict[Any, Any] = {}
        for name, path in self.paths.items():
            if path[0] == key and len(path) > 1:
                _place(root, path[1:], self._stored(name) if name in self._file.entries else self._plain(name))
            elif path[0] == key:
                return self._stored(name) if name in self._file.entries else self._plain(name)
        return _with_lists(root)

    def _stored(self, name: str) -> StoredTensor:
        shape, dtype = self._file.entries[name][0]
        return StoredTensor(torch.Size(shape), dtype, self._file, name)

    def _plain(self, name: str) -> Any:
        # An empty dict or list has an entry, and no part.
        return self._file.value(name, self._parts[name][0]) if name in self._parts else {}


def _part(index: Any, info: Any) -> tuple[str, _Part]:
    where = info.state
    file = where["relative_path"]
    if PurePosixPath(file).name != file or where.get("transform_descriptors"):
        problem = "lies outside of it" if PurePosixPath(file).name != file else "an extension of torch has transformed"
        raise CheckpointError(f"{METADATA} names `{file}`, which {problem}. Such a checkpoint is not read.")
    offset = index.state.get("offset")
    offsets = _sizes(offset) if offset is not None else ()
    begin = int(where["offset"])
    return index.state["fqn"], _Part(offsets, file, begin, begin + int(where["length"]))


def _kind(entry: Record) -> str:
    return entry.name.rpartition(".")[2]


def _sizes(size: Any) -> tuple[int, ...]:
    """Of a `torch.Size`."""
    found = size.args[0] if isinstance(size, Record) and size.args else ()
    return tuple(int(each) for each in found)


def _dtype(properties: Record) -> torch.dtype:
    """The first of what `TensorProperties` is filled with."""
    state = properties.state
    record = state["dtype"] if isinstance(state, dict) else state[0]
    name = record.name.removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype is called {record.name}")
    return found


def _place(root: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        root = root.setdefault(key, {})
    if path:
        root[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Numbers as keys stood for places in a list."""
    if not isinstance(value, dict):
        return value
    members = {key: _with_lists(each) for key, each in value.items()}
    if members and all(isinstance(key, int) for key in members) and sorted(members) == list(range(len(members))):
        return [members[index] for index in range(len(members))]
    return members
