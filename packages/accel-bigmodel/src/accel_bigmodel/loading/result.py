"""What a load did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from accel_bigmodel.loading.place import Place
from accel_bigmodel.sizes import format_bytes
from accel_bigmodel.stored import StoredTensor

__all__ = ["LoadedCheckpoint"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCheckpoint:
    """What a load did, and what it left undone."""

    places: Mapping[str, Place]
    """Where each tensor that was loaded is, by each of its names: a device, or ``"disk"``."""
    bytes_by_place: Mapping[Place, int]
    """How much lies where; tied tensors count once."""
    stored: Mapping[str, StoredTensor] = field(repr=False)
    """Those on disk, by each of their names: what `dispatch_model` takes as `offload_index`. Their files must stay."""
    missing: tuple[str, ...]
    """Tensors of the model that the checkpoint does not have. They are as they were."""
    unexpected: tuple[str, ...]
    """Tensors of the checkpoint that the model does not have."""
    bytes_read: int
    """By this process; less than was loaded where ranks share the reading."""
    bytes_written: int
    """To the offload folder."""

    def __str__(self) -> str:
        parts = [f"{format_bytes(size)} on {place}" for place, size in self.bytes_by_place.items()]
        waived = [
            f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for kind, names in (("missing", self.missing), ("unexpected", self.unexpected))
            if names
        ]
        return f"Loaded {', '.join(parts) or 'nothing'}" + (f"; {' and '.join(waived)}" if waived else "")
