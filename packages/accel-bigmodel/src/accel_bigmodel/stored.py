"""Tensors in safetensors files: where their bytes are, and read in place or into memory that is there already."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel_state.config import did_you_mean
from accel_state.errors import CheckpointError
from accel_state.tensor_format import HEADER_LIMIT_BYTES, parse_header

__all__ = [
    "INDEX_NAMES", "StoredTensor", "map_tensor", "read_bytes", "read_file_header", "read_index", "read_into",
    "read_weight_map",
]  # fmt: skip

INDEX_NAMES = ("model.safetensors", "model.safetensors.index.json")
"""What a folder with the weights of a model holds, in the order in which it is looked for."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    """The file."""
    name: str
    """What the file calls it."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes of the file before it."""

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_file_header(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of one file, in the order in which they lie in it. No values are read.

    Raises:
        CheckpointError: if it is no safetensors file, or is cut short or longer than its header says.
        OSError: if it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else HEADER_LIMIT_BYTES
        try:
            if length > min(size - 8, HEADER_LIMIT_BYTES):
                raise ValueError(f"it has {size} bytes, fewer than its header alone would take")
            found = parse_header(stream.read(length), size - 8 - length)
        except ValueError as error:
            raise CheckpointError(
                f"`{path}` is no whole safetensors file: {error}. Copy or download it again; a `.bin` file is read by "
                f"`load_checkpoint_in_model` with `weights_only`, never in place."
            ) from error
    stored = [
        StoredTensor(path, name, shape.dtype, shape.shape, 8 + length + begin) for name, (shape, begin) in found.items()
    ]
    return {each.name: each for each in sorted(stored, key=lambda each: each.offset)}


def read_index(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name. Headers are read, values are not.

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json``, or a folder that holds one of `INDEX_NAMES`, a
            single ``*.safetensors.index.json``, or safetensors files only.

    Raises:
        CheckpointError: if there is nothing of the kind, a shard is missing or damaged, or the index and the shards do
            not hold the same names.
        OSError: if a file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(
            f"There is no file or folder `{path}`. Give a `.safetensors` file, its `.index.json`, or their folder."
        )
    return _read_shards(path) if path.suffix == ".json" else read_file_header(path)


def _read_folder(folder: Path) -> dict[str, StoredTensor]:
    present = [folder / name for name in INDEX_NAMES if (folder / name).is_file()]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if present:
        return read_index(present[0])
    if len(indices) == 1:
        return _read_shards(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if not files or indices:
        what = f"several indices ({', '.join(each.name for each in indices)})" if indices else "no safetensors file"
        raise CheckpointError(
            f"The folder `{folder}` holds {what}, so what to read is not known. Give the file or the index itself."
        )
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_file_header(file).items():
            if name in found:
                raise CheckpointError(
                    f"`{name}` is both in `{found[name].path}` and in `{file}`, and no index says which one counts. "
                    f"Give one of the files, or an index."
                )
            found[name] = stored
    return found


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_weight_map(index)
    shards = {file_name: read_file_header(index.parent / file_name) for file_name in sorted(set(weight_map.values()))}
    found = {}
    for name, file_name in weight_map.items():
        if name not in shards[file_name]:
            raise CheckpointError(
                f"`{index}` places `{name}` in `{file_name}`, but that file does not hold it."
                f"{did_you_mean(name, list(shards[file_name]))} The index and the shards belong to different "
                f"checkpoints, or one was changed: copy or download them together."
            )
        found[name] = shards[file_name][name]
    return found


def read_weight_map(index: Path) -> Mapping[str, str]:
    """Which file beside the index holds which tensor. Every file is there; what they hold is not looked at.

    Raises:
        CheckpointError: if it is no index, or a file that it names is missing or elsewhere.
        OSError: if it cannot be read.
    """
    try:
        text: Any = json.loads(index.read_text(encoding="utf-8"))
        weight_map = text["weight_map"]
        if not all(isinstance(each, str) for pair in weight_map.items() for each in pair):
            raise TypeError("`weight_map` maps other things than names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"`{index}` is no index of shards ({type(error).__name__}: {error}). It should be JSON with a `weight_map` "
            f"from names of tensors to file names."
        ) from error
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise CheckpointError(
                f"`{index}` names the shard {file_name!r}, which is not a file beside it. Shards outside the folder of "
                f"their index are not read."
            )
        if not (index.parent / file_name).is_file():
            lost = [name for name, each in weight_map.items() if each == file_name]
            raise CheckpointError(
                f"`{index}` places {len(lost)} tensors, `{lost[0]}` the first, in `{file_name}`, but there is no such "
                f"file beside it. Copy or download the missing shard."
            )
    result: Mapping[str, str] = weight_map
    return result


def map_tensor(stored: StoredTensor, descriptor: int | None = None) -> torch.Tensor:
    """The tensor with the file as its memory: nothing is read before a value is looked at, and nothing is copied.

    Pages are private, so writing to the tensor changes neither the file nor what others see. A tensor that does not lie
    at a multiple of its elements' size, as in some files of others, is read instead.

    Args:
        stored: the tensor.
        descriptor: its file, if it is open.
    """
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    if descriptor is None:
        with stored.path.open("rb") as stream:
            return map_tensor(stored, stream.fileno())
    begin = stored.offset - stored.offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(descriptor, stored.offset - begin + stored.nbytes, offset=begin, access=mmap.ACCESS_COPY)
    raw = torch.frombuffer(pages, dtype=torch.uint8, offset=stored.offset - begin)
    if sys.byteorder == "big" or stored.offset % stored.dtype.itemsize:
        copy = torch.empty(stored.nbytes, dtype=torch.uint8, device="cpu")
        read_bytes(descriptor, stored, copy)
        raw = copy
    return raw.view(stored.dtype).view(stored.shape)


def read_into(stored: StoredTensor, destination: torch.Tensor) -> None:
    """Read the values into `destination`: bytes on the CPU, contiguous, as many as the tensor has.

    No memory besides is used. Safe to call from several threads, and it lets others run while it waits for the disk.

    Raises:
        CheckpointError: if the file ends before the tensor does.
        OSError: if it cannot be read.
    """
    with stored.path.open("rb", buffering=0) as stream:
        read_bytes(stream.fileno(), stored, destination)


def read_bytes(descriptor: int, stored: StoredTensor, destination: torch.Tensor, *, begin: int = 0) -> None:
    """Fill `destination`, as `read_into` takes it, from the open file, beginning at byte `begin` of the tensor.

    The position of the file does not move, so threads may share one. `begin` and the length are multiples of the
    elements' size.

    Raises:
        CheckpointError: if the file ends before `destination` is full.
        OSError: if it cannot be read.
    """
    view = destination.numpy().data
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], stored.offset + begin + done)
        if got == 0:
            raise CheckpointError(
                f"`{stored.path}` ends within `{stored.name}`: it was cut short since its header was read. "
                f"Copy or download it again."
            )
        done += got
    if sys.byteorder == "big" and stored.dtype.itemsize > 1:
        destination.copy_(destination.view(-1, stored.dtype.itemsize).flip(1).reshape(-1))
