"""Writing and reading the files of one item."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from accel_parallel.checkpoint.codec import decode, encode
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, FileRecord, ItemRecord, Manifest, checksum
from accel_parallel.checkpoint.parts import PART, StoredTensor, map_leaves
from accel_parallel.sharded import Box, is_sharded
from accel_state.errors import CheckpointError, ConfigError

__all__ = ["Checkpoint", "Item", "sync_to_disk", "write_item"]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_RESERVED = "__metadata__"
"""A key that safetensors keeps for itself."""
_DIVIDED = ("model", "optimizer")
"""Kinds of items whose tensors may be divided over ranks."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to save, in memory."""

    name: str
    """Unique in a checkpoint; the stem of its files."""
    kind: str
    state: Any
    """Nested JSON values and tensors. A flat dict of tensors becomes one safetensors file with those keys."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or f"{self.name}.json" == MANIFEST_NAME:
            raise ConfigError(
                f"An item is called {self.name!r}, which cannot be the stem of its files: letters, digits, `_`, `-` "
                f"and inner dots can, and `manifest` is taken. Give it another name."
            )

    @property
    def is_flat(self) -> bool:
        """Whether it is a dict of tensors and nothing else, so that any safetensors reader can use its file."""
        state = self.state
        if not isinstance(state, Mapping) or not state or _RESERVED in state:
            return False
        return all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())


def sync_to_disk(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_item(folder: Path, item: Item) -> tuple[ItemRecord, dict[str, FileRecord]]:
    """Write the files of one item, flushed to the disk, and return what the manifest says of them.

    Raises:
        OSError: whatever the disk says, such as being full.
        CheckpointError: for a value that cannot be stored.
    """
    if item.is_flat:
        tree, tensors = None, {name: tensor.detach() for name, tensor in item.state.items()}
    else:
        tree, tensors = encode(item.state, item=item.name)
    for name, tensor in tensors.items():
        _refuse_unstorable(item, name, tensor)
    files: list[str] = []
    distinct, aliases = _split_tied(tensors)
    if distinct:
        files.append(f"{item.name}.safetensors")
        try:
            save_file(distinct, folder / files[-1], metadata={"format": "pt"})
        except SafetensorError as error:  # it reports a full disk so, too
            raise OSError(f"writing `{files[-1]}` failed: {error}") from error
    if tree is not None or not files:
        files.append(f"{item.name}.json")
        (folder / files[-1]).write_text(json.dumps(tree), encoding="utf-8")
    records = {}
    for name in files:
        sync_to_disk(folder / name)
        records[name] = FileRecord((folder / name).stat().st_size, checksum(folder / name))
    return ItemRecord(item.kind, tuple(files), aliases), records


def _refuse_unstorable(item: Item, name: str, tensor: torch.Tensor) -> None:
    problem = None
    if is_sharded(tensor):
        raise CheckpointError(
            f"The tensor `{name}` of `{item.name}` is divided over processes, and only models and optimizers are saved "
            f"in parts. Let `state_dict()` return it whole, on every process, by `tensor.full_tensor()`."
        )
    if tensor.is_meta:
        problem = "is on the meta device and has no values"
    elif tensor.layout is not torch.strided:
        problem = f"has the layout {tensor.layout}, and files hold dense tensors"
    elif tensor.dtype is torch.complex128 or tensor.is_quantized:
        problem = f"is {tensor.dtype}, which files cannot hold"
    if problem is not None:
        raise CheckpointError(
            f"The tensor `{name}` of `{item.name}` {problem}. Let `state_dict()` return it as a dense tensor with "
            f"values, for example `tensor.to_dense()` or `torch.view_as_real(tensor)`."
        )


def _split_tied(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """One entry for each tensor that is the same memory under several names; views of it become copies."""
    distinct: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, lazy in tensors.items():
        tensor = lazy.resolve_conj().resolve_neg()  # files hold the bytes, and such views are only flagged
        storage = tensor.untyped_storage().data_ptr()
        place = (
            storage,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            str(tensor.device),
        )
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        whole = tensor.is_contiguous() and storage not in storages and _fills_storage(tensor)
        distinct[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage)
    return distinct, aliases


def _fills_storage(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Checkpoint:
    """A complete checkpoint on disk, opened for reading."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: if the folder holds no complete checkpoint.
        """
        self.folder = folder
        self.manifest = Manifest.read(folder)

    @property
    def items(self) -> Mapping[str, ItemRecord]:
        """What is in it, by name."""
        return self.manifest.items

    def read(self, item: str) -> Any:
        """The state of one item, tensors on the CPU, after its files proved unchanged.

        Raises:
            CheckpointError: if it is not in the checkpoint, or a file is missing or damaged; the error names both.
        """
        if item not in self.items:
            raise CheckpointError(
                f"`{self.folder}` holds no `{item}`; it holds {', '.join(sorted(self.items))}. "
                f"Prepare and register the same objects, in the same order, as when it was written."
            )
        self.manifest.verify(self.folder, item)
        record = self.items[item]
        tensors: dict[str, torch.Tensor] = {}
        tree: Any = None
        for name in record.files:
            if name.endswith(".safetensors"):
                tensors.update(load_file(self.folder / name))
            else:
                tree = json.loads((self.folder / name).read_text(encoding="utf-8"))
        tensors.update({alias: tensors[name] for alias, name in record.aliases.items()})
        has_tree = any(name.endswith(".json") for name in record.files)
        if not has_tree:
            return tensors
        state = decode(tree, tensors, item=item)
        if record.kind not in _DIVIDED:
            return state
        return map_leaves(state, lambda _, leaf: leaf.bound_to(self._read_box) if _is_stored(leaf) else leaf)

    def verify_parts(self, *, share: int = 0, num_shares: int = 1) -> None:
        """Prove that parts of divided tensors are unchanged, one share of them for each of several readers.

        Raises:
            CheckpointError: if a file is missing or damaged.
        """
        parts = sorted(name for name, record in self.items.items() if record.kind == PART)
        for name in parts[share::num_shares]:
            self.manifest.verify(self.folder, name)

    def _read_box(self, item: str, key: str, box: Box) -> torch.Tensor:
        """A box of a tensor of an item whose files hold parts."""
        record = self.items.get(item)
        if record is None:
            raise CheckpointError(
                f"`{self.folder}` says that a part of `{key}` is in `{item}`, which it does not hold. "
                f"Load another checkpoint."
            )
        try:
            with safe_open(self.folder / record.files[0], framework="pt") as reader:
                part: torch.Tensor = reader.get_slice(record.aliases.get(key, key))[box.slices]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"A part of `{key}` could not be read from `{self.folder / record.files[0]}` ({error}). "
                f"Load another checkpoint."
            ) from error
        return part


def _is_stored(leaf: object) -> TypeGuard[StoredTensor]:
    return isinstance(leaf, StoredTensor)
