"""What a checkpoint says of itself: the one file whose presence makes a folder a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from accel_state.errors import CheckpointError

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "FileRecord", "ItemRecord", "Manifest", "checksum"]

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 22
_SEAL = "xxh3_128"


def checksum(path: Path) -> str:
    """XXH3-128 of a file's bytes, as hexadecimal (https://github.com/Cyan4973/xxHash): finds damage, not malice."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _seal(data: Mapping[str, Any]) -> str:
    """Checksum of values, whatever the white space around them."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file."""

    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One thing that was saved."""

    kind: str
    """What it is: model, optimizer, scheduler, scaler, loader, rng, custom, progress."""
    files: tuple[str, ...]
    """Names of its files in the checkpoint's folder."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are another one under a second name (tied weights), and that one's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a checkpoint but its contents."""

    step: int
    """Optimizer steps taken when it was written."""
    world_size: int
    strategy: str
    libraries: Mapping[str, str]
    """Versions it was written with."""
    items: Mapping[str, ItemRecord]
    files: Mapping[str, FileRecord]
    version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the file, which ends in a checksum of itself."""
        data = {"format": "accel-checkpoint", **asdict(self)}
        return json.dumps({**data, _SEAL: _seal(data)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: if there is none, or it is damaged, newer, or names files outside its folder.
        """
        path = folder / MANIFEST_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(
                f"`{folder}` holds no `{MANIFEST_NAME}`, so it is no complete checkpoint: a save ends by writing "
                "that file. "
                f"Name another folder, or call `load_state()` without one for the latest complete checkpoint."
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"`{path}` is damaged ({error}), so what the checkpoint holds is not known. Load another checkpoint."
            ) from error
        return cls._from_data(data, path)

    @classmethod
    def _from_data(cls, data: Any, path: Path) -> Manifest:
        if not isinstance(data, dict) or data.get("format") != "accel-checkpoint":
            raise CheckpointError(f"`{path}` is not a checkpoint's manifest. Name the folder of a checkpoint.")
        if data.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"`{path}` has format version {data.get('version')!r}, and this accel-parallel reads {FORMAT_VERSION}. "
                f"Install the version that wrote it: {data.get('libraries')}."
            )
        if data.get(_SEAL) != _seal({key: value for key, value in data.items() if key != _SEAL}):
            raise CheckpointError(
                f"`{path}` is damaged: its checksum differs, so what the checkpoint holds is not known. "
                f"Load another checkpoint."
            )
        try:
            manifest = cls(
                step=data["step"],
                world_size=data["world_size"],
                strategy=data["strategy"],
                libraries=data["libraries"],
                items={
                    name: ItemRecord(item["kind"], tuple(item["files"]), item["aliases"])
                    for name, item in data["items"].items()
                },
                files={name: FileRecord(**record) for name, record in data["files"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"`{path}` is damaged: {error!r} is missing or odd. Load another checkpoint."
            ) from error
        manifest._refuse_foreign_paths(path)
        return manifest

    def _refuse_foreign_paths(self, path: Path) -> None:
        for name in self.files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise CheckpointError(
                    f"`{path}` names the file `{name}`, which lies outside the checkpoint's folder. "
                    f"Do not load it: no save writes such a name."
                )
        for item, record in self.items.items():
            for name in record.files:
                if name not in self.files:
                    raise CheckpointError(
                        f"`{path}` gives `{item}` the file `{name}` and does not list it. Load another checkpoint."
                    )

    def verify(self, folder: Path, item: str) -> None:
        """Compare the files of one item with what was written.

        Raises:
            CheckpointError: naming the item and the file that is missing, cut short or changed.
        """
        for name in self.items[item].files:
            path, record = folder / name, self.files[name]
            if not path.is_file() or path.is_symlink():
                problem = "is missing" if not path.exists() else "is not a plain file"
            elif path.stat().st_size != record.size_bytes:
                problem = f"has {path.stat().st_size} bytes instead of {record.size_bytes}"
            elif checksum(path) != record.xxh3_128:
                problem = "has changed since it was written: its checksum differs"
            else:
                continue
            raise CheckpointError(
                f"`{name}` of `{item}` in `{folder}` {problem}, so `{item}` cannot be restored. Load another "
                "checkpoint."
            )
