"""Reading a checkpoint: whole states, or any part of any tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accel_parallel.checkpoint.codec import decode
from accel_parallel.checkpoint.folder import Folder
from accel_parallel.checkpoint.manifest import ItemRecord, Manifest
from accel_parallel.checkpoint.staging import folder_of
from accel_parallel.checkpoint.tensor_file import StoredTensor, TensorFile
from accel_state.errors import CheckpointError

__all__ = ["NUM_THREADS", "Checkpoint"]

NUM_THREADS = 4
"""Files that are read or written at once by a process."""


class Checkpoint:
    """A complete checkpoint, opened for reading."""

    def __init__(self, folder: str | Path | Folder) -> None:
        """
        Raises:
            CheckpointError: if the folder holds no complete checkpoint.
        """
        self.folder: Folder = folder_of(folder) if isinstance(folder, (str, Path)) else folder
        self.manifest = Manifest.read(self.folder)
        self._files: dict[str, TensorFile] = {}
        self._proved: set[str] = set()

    @property
    def items(self) -> Mapping[str, ItemRecord]:
        """What is in it, by name."""
        return self.manifest.items

    def read(self, item: str, *, lazy: bool = False, verify: bool = True) -> Any:
        """The state of one item, tensors on the CPU.

        Args:
            item: its name.
            lazy: whether tensors come as `StoredTensor`, of which any part can be read later.
            verify: whether its files are proved to be what was written first; each is once.

        Raises:
            CheckpointError: if it is not in the checkpoint, or a file is missing or damaged; the error names both.
        """
        record = self._record(item)
        if verify:
            self.verify([item])
        stored = self.tensors(item)
        found: Mapping[str, Any] = stored
        if not lazy:
            found = {name: tensor.read() for name, tensor in stored.items() if name not in record.aliases}
            found = {**found, **{alias: found[name] for alias, name in record.aliases.items()}}
        if f"{item}.json" not in record.files:
            return found
        return decode(self._json(item), found, item=item)

    def tensors(self, item: str) -> dict[str, StoredTensor]:
        """The tensors of one item by name, tied ones under each, not read yet.

        Raises:
            CheckpointError: if it is not in the checkpoint, or a file is missing or damaged.
        """
        record = self._record(item)
        found: dict[str, StoredTensor] = {}
        for name in record.files:
            if name.endswith(".safetensors"):
                found.update(self._open(name, item).tensors())
        try:
            found.update({alias: found[name] for alias, name in record.aliases.items()})
        except KeyError as error:
            raise CheckpointError(
                f"`{item}` in `{self.folder.location}` has no tensor {error}, which another is tied to. Load another "
                f"checkpoint."
            ) from error
        return found

    def verify(
        self,
        items: Iterable[str] | None = None,
        *,
        share: int = 0,
        num_shares: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prove that files are what was written, one share of them for each of several readers.

        Args:
            items: whose files; by default all.
            share: which of the shares, from 0.
            num_shares: in how many shares of about the same size the files are dealt out.
            progress: called with the bytes of each file once it is proved.

        Raises:
            CheckpointError: naming the first file that is missing or damaged.
        """
        names = {name for item in (self.items if items is None else items) for name in self._record(item).files}
        mine = [name for name in _share(sorted(names), self.manifest, share, num_shares) if name not in self._proved]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for name, _ in zip(mine, pool.map(lambda name: self.manifest.verify(self.folder, name), mine), strict=True):
                self._proved.add(name)
                if progress is not None:
                    progress(self.manifest.files[name].size_bytes)

    def _record(self, item: str) -> ItemRecord:
        if item not in self.items:
            raise CheckpointError(
                f"`{self.folder.location}` holds no `{item}`; it holds {', '.join(sorted(self.items))}. "
                f"Prepare and register the same objects, in the same order, as when it was written."
            )
        return self.items[item]

    def _open(self, name: str, item: str) -> TensorFile:
        if name not in self._files:
            try:
                self._files[name] = TensorFile(self.manifest.files_in(self.folder), name)
            except OSError as error:
                raise self._unreadable(name, item, error) from error
        return self._files[name]

    def _json(self, item: str) -> Any:
        name = f"{item}.json"
        try:
            file = self.manifest.files_in(self.folder).open(name)
            return json.loads(bytes(file.view(0, file.size_bytes)))
        except (OSError, ValueError) as error:
            raise self._unreadable(name, item, error) from error

    def _unreadable(self, name: str, item: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"`{name}` of `{item}` in `{self.folder.location}` could not be read ({error}). Load another checkpoint."
        )


def _share(names: Sequence[str], manifest: Manifest, share: int, num_shares: int) -> list[str]:
    """The largest first, each to whom has least so far; the same on every reader."""
    filled = [0] * num_shares
    mine = []
    for name in sorted(names, key=lambda name: (-manifest.files[name].size_bytes, name)):
        least = filled.index(min(filled))
        filled[least] += manifest.files[name].size_bytes + 1
        if least == share:
            mine.append(name)
    return mine
