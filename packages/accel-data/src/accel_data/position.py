"""Where a loader stands, and its record as JSON.

The cursor counts what the whole world has consumed, not what a rank has. So one record serves all ranks, and
it can be read by another number of them, with another batch size: the rest of the epoch is cut anew from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from accel_state.errors import ConfigError

__all__ = ["DataKey", "OrderKind", "Position", "read_position", "write_position"]

OrderKind = Literal["sequential", "permutation", "sampler", "batch_sampler", "stream"]
"""What decides the order: the indices, our permutation, the user's sampler or batch sampler, or an iterable."""

_VERSION = 1
_LIMIT = 1 << 63


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place in a sequence of epochs."""

    seed: int
    """Seed of the order of all epochs; below 2**63."""
    epoch: int = 0
    """Number of the epoch, from 0."""
    batches: int = 0
    """Global batches of the epoch that have been handed out."""
    cursor: int = 0
    """Samples of the epoch that have been handed out to all ranks together, padding not counted; for a batch
    sampler of the user's: how many of its batches."""
    fingerprint: str | None = None
    """Checksum of the order in which the epoch in progress was drawn, where a sampler of the user's draws it."""

    def next_epoch(self) -> Position:
        """The start of the epoch after this one."""
        return Position(seed=self.seed, epoch=self.epoch + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataKey:
    """What a loader reads, as far as a position depends on it."""

    kind: OrderKind
    length: int | None
    """Samples of an epoch, batches for a batch sampler; ``None`` where that is not known before the end."""
    num_workers: int = 0
    """Worker processes among which a stream is divided; 0 for data of known order."""
    global_size: int = 0
    """Samples of a global batch, where the position depends on it: a stream with several workers."""


def write_position(position: Position, key: DataKey) -> dict[str, Any]:
    """The record of a position: JSON values only."""
    state: dict[str, Any] = {
        "version": _VERSION,
        "order": key.kind,
        "seed": position.seed,
        "epoch": position.epoch,
        "batches": position.batches,
        "cursor": position.cursor,
        "length": key.length,
    }
    if position.fingerprint is not None:
        state["fingerprint"] = position.fingerprint
    if key.kind == "stream":
        state["num_workers"] = key.num_workers
        state["global_size"] = key.global_size
    return state


def read_position(state: Mapping[str, Any], key: DataKey, *, name: str) -> Position:
    """The position of a record.

    Args:
        state: what `write_position` gave.
        key: what the loader that is to stand there reads.
        name: how the loader is called in errors.

    Raises:
        ConfigError: if it is no such record, or one of other data.
    """
    version = state.get("version")
    if version != _VERSION:
        raise ConfigError(
            f"The state for {name} has version {version!r}, and this accel-data reads version {_VERSION}. "
            f"Give a state that its `state_dict` made, or install the version of accel-data that wrote it."
        )
    counts = {entry: _count(state, entry, name) for entry in ("seed", "epoch", "batches", "cursor")}
    _check_key(state, key, name)
    length = key.length
    if length is not None and counts["cursor"] > length:
        raise ConfigError(
            f"The state for {name} stands at {counts['cursor']}, and an epoch ends at {length}: the record is damaged. "
            f"Restore an earlier checkpoint."
        )
    fingerprint = state.get("fingerprint")
    return Position(**counts, fingerprint=None if fingerprint is None else str(fingerprint))


def _count(state: Mapping[str, Any], entry: str, name: str) -> int:
    given = state.get(entry)
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < _LIMIT:
        raise ConfigError(
            f"The state for {name} has `{entry}={given!r}`, which is not a count from 0, so the place is not known. "
            f"Give a state that its `state_dict` made."
        )
    return given


def _check_key(state: Mapping[str, Any], key: DataKey, name: str) -> None:
    if state.get("order") != key.kind:
        raise ConfigError(
            f"The state for {name} was written for a {_words(state.get('order'))}, and it now has a "
            f"{_words(key.kind)}: the samples that were seen are not those before this cursor. "
            f"Build the loader with the same kind of sampler, or start the epoch anew with `set_epoch`."
        )
    if state.get("length") != key.length:
        unit = "batches" if key.kind == "batch_sampler" else "samples"
        raise ConfigError(
            f"The state for {name} was written for an epoch of {state.get('length')} {unit}, and there are "
            f"{key.length} now: the order of another length is another one, so which {unit} were seen cannot be told. "
            f"Give the dataset of before, or start the epoch anew with `set_epoch`."
        )
    if key.kind != "stream":
        return
    workers, size = state.get("num_workers"), state.get("global_size")
    if (workers, size) != (key.num_workers, key.global_size) and max(int(workers or 0), key.num_workers) > 1:
        raise ConfigError(
            f"The state for {name} was written with {workers} workers and global batches of {size}, and there are "
            f"{key.num_workers} workers and global batches of {key.global_size} now: several workers divide a stream "
            f"among them, so its order is another one. Use the same numbers, or at most one worker on both sides."
        )


def _words(kind: object) -> str:
    words = {
        "sequential": "loader in sequential order",
        "permutation": "shuffled loader",
        "sampler": "loader with a sampler of its own",
        "batch_sampler": "loader with a batch sampler of its own",
        "stream": "loader over an iterable dataset",
    }
    return words.get(str(kind), f"loader of kind {kind!r}")
