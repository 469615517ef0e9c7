"""Checkpoints that are whole or not there: items become files, files a manifest, the manifest a rename.

====================  ==========================================================
`codec`               a state of any shape, split into JSON and tensors, without pickle
`item`                one thing to save, taken apart
`plan`                which files its tensors become, and who writes each
`exchange`            divided tensors put together where they are written
`outgoing`            the files that a rank writes
`tensor_file`         reading and writing files of tensors part by part
`manifest`            what a checkpoint says of itself: items, files, sizes, checksums
`location`            a path, or the URL of an object store
`folder`              where files are: on a disk, or in an `object_store` (`remote`)
`staging`             how a new checkpoint takes its name; `owner` says whether who began one still lives
`background`          saves that go on while the run trains: a copy of the state (`host_buffer`), a process of
                      its own (`writer`), and what the run holds of it (`pending`)
`commit`              every rank takes part: all of it, or nothing
`store`               reading a checkpoint
`layout`              names of folders, which is the latest, which may go
`shelf`               the same questions asked of a folder or of an object store (`remote_shelf`)
====================  ==========================================================

Names are imported when they are first used: a run that never saves never loads them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_parallel.checkpoint.background import BackgroundSaver as BackgroundSaver
    from accel_parallel.checkpoint.commit import save_checkpoint as save_checkpoint
    from accel_parallel.checkpoint.commit import write_checkpoint as write_checkpoint
    from accel_parallel.checkpoint.item import Item as Item
    from accel_parallel.checkpoint.layout import latest_checkpoint as latest_checkpoint
    from accel_parallel.checkpoint.layout import next_number as next_number
    from accel_parallel.checkpoint.layout import numbered_path as numbered_path
    from accel_parallel.checkpoint.layout import prune as prune
    from accel_parallel.checkpoint.manifest import About as About
    from accel_parallel.checkpoint.manifest import Manifest as Manifest
    from accel_parallel.checkpoint.pending import PendingSave as PendingSave
    from accel_parallel.checkpoint.store import Checkpoint as Checkpoint
    from accel_parallel.checkpoint.tensor_file import StoredTensor as StoredTensor

_HOME = {
    "BackgroundSaver": "background",
    "save_checkpoint": "commit",
    "write_checkpoint": "commit",
    "Item": "item",
    "latest_checkpoint": "layout",
    "next_number": "layout",
    "numbered_path": "layout",
    "prune": "layout",
    "About": "manifest",
    "Manifest": "manifest",
    "PendingSave": "pending",
    "Checkpoint": "store",
    "StoredTensor": "tensor_file",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
