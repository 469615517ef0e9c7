"""A model's weights in files that others read: safetensors, in shards with an index where they are large.

The layout is the one of the model hubs: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on with
``model.safetensors.index.json``, which says which file holds which tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel_state.collectives import broadcast_object_list
from accel_state.errors import CheckpointError, ConfigError
from accel_state.logging import tqdm
from accel_state.process import Process

__all__ = ["names_of_ties", "on_main", "save_tensors", "save_weights", "size_in_bytes"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NAME, _INDEX = "model", "model.safetensors.index.json"


def size_in_bytes(size: int | str) -> int:
    """A size as users write it, such as ``"5GB"`` or ``"512MiB"``.

    Raises:
        ConfigError: for anything else, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size) if isinstance(size, str) else None
    if found is not None and found[2].upper() in _UNITS:
        size = int(float(found[1]) * _UNITS[found[2].upper()])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(
            f"`max_shard_size={size!r}` is no size of a file. Give a number of bytes, or one with a unit such as '5GB' "
            f"or '512MiB'."
        )
    return size


def save_tensors(tensors: Mapping[str, Any], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file; it appears complete or not at all.

    Raises:
        ConfigError: naming what is no tensor.
    """
    from safetensors.torch import save_file

    odd = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ConfigError(
            f"`{odd[0]}` is a {type(tensors[odd[0]]).__name__}, and {path.name} holds tensors by name. Save other "
            f"things with `save_state`, or as JSON."
        )
    written = path.with_name(f".{path.name}.part")
    try:
        own = {name: value.detach().contiguous() for name, value in tensors.items()}
        save_file(own, written, {"format": "pt", **(metadata or {})})
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def names_of_ties(model: nn.Module) -> set[str]:
    """Names under which a tensor of `model` is known besides its first one."""
    first: dict[int, str] = {}
    held = model.state_dict(keep_vars=True)
    return {name for name, tensor in held.items() if first.setdefault(id(tensor), name) != name}


def save_weights(
    state: Mapping[str, torch.Tensor], folder: Path, *, max_shard_size: int, ties: Collection[str] = ()
) -> None:
    """Write a model's weights, in shards of at most that many bytes; a larger tensor is alone in its own.

    What an earlier call left there and this one does not write is removed, last.

    Args:
        state: weights by name.
        folder: made if missing.
        max_shard_size: of a file.
        ties: names that are left out, since models tie them again when they load.
    """
    from accel_parallel.checkpoint.manifest import MANIFEST_NAME

    if (folder / MANIFEST_NAME).exists():
        raise CheckpointError(
            f"`{folder}` is a checkpoint, whose own weights these would replace, and it could not be loaded any more. "
            f"Name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards({name: tensor for name, tensor in state.items() if name not in ties}, max_shard_size))
    names = [
        f"{_NAME}.safetensors" if len(shards) == 1 else f"{_NAME}-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in tqdm(list(zip(names, shards, strict=True)), desc="weights", disable=len(shards) == 1):
        save_tensors(shard, folder / name)
    if len(shards) > 1:
        held = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": held}, indent=2, sort_keys=True)
        written = folder / f".{_INDEX}.part"
        written.write_text(text + "\n")
        written.replace(folder / _INDEX)
        names.append(_INDEX)
    for path in folder.iterdir():
        known = path.name == _INDEX or re.fullmatch(rf"{_NAME}(-\d{{5}}-of-\d{{5}})?\.safetensors", path.name)
        if known and path.name not in names:
            path.unlink()


def on_main(write: Callable[[], None], *, process: Process, what: str) -> None:
    """Every rank must call this. Write on the main process; where that fails, all raise.

    Raises:
        CheckpointError: on every rank, naming `what` and the reason.
    """
    from safetensors import SafetensorError

    from accel_parallel.checkpoint.staging import FAILURES

    problem: str | None = None
    if process.topology.is_main:
        try:
            write()
        except (*FAILURES, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
    (problem,) = broadcast_object_list([problem], process=process)
    if problem is not None:
        raise CheckpointError(f"{what} could not be written ({problem}). Make room or choose another folder.")


def _shards(state: Mapping[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in state.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        # Views of one memory are written apart: the file format knows no sharing.
        shard[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        size += tensor.nbytes
    yield shard
