"""Checkpoints that are whole or not there: items become files, files a manifest, the manifest a rename.

====================  ==========================================================
`codec`               a state of any shape, split into JSON and tensors, without pickle
`manifest`            what a checkpoint says of itself: items, files, sizes, checksums
`store`               writing and reading one item's files
`commit`              temporary folder, manifest, one rename: every rank takes part
`layout`              names of folders, which is the latest, which may go
====================  ==========================================================
"""

from __future__ import annotations

from accel_parallel.checkpoint.commit import save_checkpoint
from accel_parallel.checkpoint.layout import latest_checkpoint, next_number, numbered_path, prune
from accel_parallel.checkpoint.manifest import Manifest
from accel_parallel.checkpoint.store import Checkpoint, Item

__all__ = [
    "Checkpoint",
    "Item",
    "Manifest",
    "latest_checkpoint",
    "next_number",
    "numbered_path",
    "prune",
    "save_checkpoint",
]
