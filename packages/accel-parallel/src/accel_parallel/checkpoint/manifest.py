"""What a checkpoint says of itself: the one file whose presence makes a folder a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import xxhash

from accel_parallel.checkpoint.folder import File, FileRecord, Folder
from accel_state.errors import CheckpointError
from accel_state.topology import AXES

if TYPE_CHECKING:
    from accel_state.process import Process

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "About", "ItemRecord", "Manifest", "placed"]

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
_SEAL = "xxh3_128"
_LIBRARIES = ("accel", "accel-state", "accel-parallel", "torch", "safetensors")


def _seal(data: Mapping[str, Any]) -> str:
    """Checksum of values, whatever the white space around them."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _sealed(data: Mapping[str, Any]) -> str:
    return json.dumps({**data, _SEAL: _seal(data)}, indent=1, sort_keys=True) + "\n"


def placed(text: str, place: str) -> str:
    """A manifest's text, for files that lie in the folder `place` below it."""
    data = {key: value for key, value in json.loads(text).items() if key != _SEAL}
    return _sealed({**data, "place": place})


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One thing that was saved."""

    kind: str
    """What it is: model, optimizer, scheduler, scaler, loader, rng, custom, progress."""
    files: tuple[str, ...]
    """Names of its files in the checkpoint's folder."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are another one under a second name (tied weights), and that one's name."""
    of: str = ""
    """Class of the object whose state it is, where another class must not take it; else empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a checkpoint but its contents."""

    step: int
    """Optimizer steps taken when it was written."""
    world_size: int
    strategy: str
    mesh: Mapping[str, int]
    """Processes along each axis of parallelism that had more than one. For information: any other mesh reads it."""
    libraries: Mapping[str, str]
    """Versions it was written with."""
    items: Mapping[str, ItemRecord]
    files: Mapping[str, FileRecord]
    place: str = ""
    """Folder below the manifest's own that holds the files; empty where that is its own. In an object store, where
    nothing can be renamed, each save has another one."""
    version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the file, which ends in a checksum of itself."""
        return _sealed({"format": "accel-checkpoint", **asdict(self)})

    @classmethod
    def read(cls, folder: Folder) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: if there is none, or it is damaged, newer, or names files outside its folder.
        """
        path = f"{folder.location}/{MANIFEST_NAME}"
        try:
            file = folder.open(MANIFEST_NAME)
            data = json.loads(bytes(file.view(0, file.size_bytes)).decode("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(
                f"`{folder.location}` holds no `{MANIFEST_NAME}`, so it is no complete checkpoint: a save ends by "
                f"writing that file. Name another folder, or call `load_state()` without one for the latest complete "
                f"checkpoint."
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"`{path}` is damaged ({error}), so what the checkpoint holds is not known. Load another checkpoint."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"`{path}` could not be read ({error}). Make it readable, or load another checkpoint."
            ) from error
        return cls._from_data(data, path)

    @classmethod
    def _from_data(cls, data: Any, path: str) -> Manifest:
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
                mesh=data["mesh"],
                libraries=data["libraries"],
                items={
                    name: ItemRecord(item["kind"], tuple(item["files"]), item["aliases"], item["of"])
                    for name, item in data["items"].items()
                },
                files={name: FileRecord(**record) for name, record in data["files"].items()},
                place=data.get("place", ""),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"`{path}` is damaged: {error!r} is missing or odd. Load another checkpoint."
            ) from error
        manifest._refuse_foreign_paths(path)
        return manifest

    def _refuse_foreign_paths(self, path: str) -> None:
        for name in (*self.files, *([self.place] if self.place else [])):
            if not isinstance(name, str) or PurePath(name).name != name or name in ("", ".", ".."):
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

    def files_in(self, folder: Folder) -> Folder:
        """Where the files are of the checkpoint in that folder."""
        return folder.below(self.place) if self.place else folder

    def verify(self, folder: Folder, name: str) -> None:
        """Compare a file of the checkpoint in that folder with what was written.

        Raises:
            CheckpointError: naming the file and its item, if it is missing, cut short, changed or unreadable.
        """
        record = self.files[name]
        try:
            file = self.files_in(folder).open(name)
            if file.size_bytes != record.size_bytes:
                problem = f"has {file.size_bytes} bytes instead of {record.size_bytes}"
            elif _checksum(file) != record.xxh3_128:
                problem = "has changed since it was written: its checksum differs"
            else:
                return
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read as a plain file ({error.strerror or error})"
        owners = " and ".join(f"`{item}`" for item, each in self.items.items() if name in each.files)
        raise CheckpointError(
            f"`{name}` of {owners} in `{folder.location}` {problem}, so that cannot be restored. Load another "
            f"checkpoint."
        )


def _checksum(file: File) -> str:
    digest = xxhash.xxh3_128()
    for chunk in file.chunks():
        digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What the manifest says besides files."""

    step: int
    """Optimizer steps taken."""
    strategy: str
    mesh: Mapping[str, int] = field(default_factory=dict)
    world_size: int = 1
    libraries: Mapping[str, str] = field(default_factory=lambda: _versions())
    """Versions it is written with."""

    @classmethod
    def run(cls, process: Process, *, step: int, strategy: str) -> About:
        """Of the run that `process` is one of."""
        topology = process.topology
        mesh: dict[str, int] = {axis: topology.shape.size_of(axis) for axis in AXES if topology.shape.size_of(axis) > 1}
        return cls(step=step, strategy=strategy, mesh=mesh, world_size=topology.world_size)

    def manifest_of(self, items: Mapping[str, ItemRecord], files: Mapping[str, FileRecord]) -> Manifest:
        """The manifest of a checkpoint with these contents."""
        return Manifest(
            step=self.step,
            world_size=self.world_size,
            strategy=self.strategy,
            mesh=self.mesh,
            libraries=self.libraries,
            items=items,
            files=files,
        )


def _versions() -> Mapping[str, str]:
    return {name: found for name in _LIBRARIES if (found := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout by PYTHONPATH, or the leaf alone
        return None
