"""Where a loader stands, and its record as JSON.

The cursor counts what the whole world has consumed, not what a rank has. So one record serves all ranks, and
it can be read by another number of them, with another batch size: the rest of the epoch is cut anew from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from accel_state.errors import ConfigError

__all__ = ["DataKey", "OrderKind", "PartPlace", "Position", "WorkerPlace", "read_position", "write_position"]

OrderKind = Literal["sequential", "permutation", "sampler", "batch_sampler", "stream"]
"""What decides the order: the indices, our permutation, the user's sampler or batch sampler, or an iterable."""

_VERSION = 1
_LIMIT = 1 << 63


class WorkerPlace(NamedTuple):
    """Where one worker stands in its share of a part of a stream. Without workers the process itself is the one."""

    samples: int = 0
    """Samples that it has handed out in this epoch."""
    at: int = 0
    """Samples before `state`; those from there to `samples` are read again."""
    ended: bool = False
    """Whether it has said that there is no more."""
    state: Any = None
    """State of the dataset, if it has any: JSON values and tensors."""


class PartPlace(NamedTuple):
    """Where a part of a stream stands."""

    turn: int
    """The worker that gives the next batch."""
    workers: tuple[WorkerPlace, ...]

    @property
    def samples(self) -> int:
        """Samples of the part that have been handed out."""
        return sum(worker.samples for worker in self.workers)

    def at_end(self) -> PartPlace:
        """The end of the epoch, where nothing follows."""
        ended = (worker._replace(at=worker.samples, ended=True, state=None) for worker in self.workers)
        return PartPlace(0, tuple(ended))


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
    places: Mapping[int, int | PartPlace] | None = None
    """Where the parts of the data stand, by number of the part: of a map-style dataset a cursor in samples. ``None`` at
    the beginning of an epoch, and where `cursor` says it all. Of a stream in parts a rank knows its own only."""
    num_parts: int = 1
    """How many places there are, known or not."""

    def next_epoch(self) -> Position:
        """The start of the epoch after this one."""
        return Position(seed=self.seed, epoch=self.epoch + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataKey:
    """What a loader reads, as far as a position depends on it."""

    kind: OrderKind
    length: int | None
    """Samples of an epoch; ``None`` where a sampler of the user's or the end of a stream tells it."""
    num_parts: int = 1
    """Into how many parts a map-style dataset is divided; a stream's number is that of its places."""
    num_workers: int = 1
    """Workers among which a stream is divided."""


def write_position(position: Position, key: DataKey) -> dict[str, Any]:
    """The record of a position: JSON values only, but for tensors in states of datasets."""
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
    if position.places is not None:
        state["places"] = [_written(position.places[part]) for part in range(len(position.places))]
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
        raise _damaged(name, f"stands at {counts['cursor']}, and an epoch ends at {length}")
    fingerprint = state.get("fingerprint")
    places = _read_places(state.get("places"), key, name, begun=counts["batches"] > 0)
    return Position(
        **counts,
        fingerprint=None if fingerprint is None else str(fingerprint),
        places=places,
        num_parts=len(places or (0,)),
    )


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
        raise ConfigError(
            f"The state for {name} was written for an epoch of {state.get('length')} samples, and there are "
            f"{key.length} now: the order of another length is another one, so which samples were seen cannot be told. "
            f"Give the dataset of before, or start the epoch anew with `set_epoch`."
        )


def _read_places(places: Any, key: DataKey, name: str, *, begun: bool) -> dict[int, int | PartPlace] | None:
    if places is None:
        if key.kind == "stream" and begun:
            raise _damaged(name, "stands in an epoch of a stream and has no places in it")
        return None
    if not isinstance(places, list) or not places:
        raise _damaged(name, "has no list of places")
    if key.kind == "stream":
        return {part: _read_part(each, key.num_workers, name) for part, each in enumerate(places)}
    if len(places) != key.num_parts:
        raise ConfigError(
            f"The state for {name} was written with the dataset in {len(places)} parts, and it is divided into "
            f"{key.num_parts} now: the order of the rest would be another one. "
            f"Start as many nodes (or ranks, with a rule of your own) as before, or start the epoch anew with "
            f"`set_epoch`."
        )
    if any(not isinstance(each, int) or each < 0 for each in places):
        raise _damaged(name, f"has the places {places!r}")
    return dict(enumerate(places))


def _read_part(given: Any, num_workers: int, name: str) -> PartPlace:
    try:
        workers = tuple(
            WorkerPlace(int(each["samples"]), int(each["at"]), bool(each["ended"]), each.get("state"))
            for each in given["workers"]
        )
        place = PartPlace(int(given["turn"]), workers)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(name, "has places that cannot be read") from error
    if any(not 0 <= worker.at <= worker.samples for worker in workers) or not 0 <= place.turn < max(1, len(workers)):
        raise _damaged(name, "has places that contradict one another")
    if len(workers) != num_workers:
        raise ConfigError(
            f"The state for {name} was written with {len(workers)} worker(s) reading the stream, and there are "
            f"{num_workers} now: workers divide a stream among them, so its order is another one. "
            f"Set `num_workers` as before (0 and 1 are alike)."
        )
    return place


def _written(place: int | PartPlace) -> Any:
    if isinstance(place, int):
        return place
    return {"turn": place.turn, "workers": [worker._asdict() for worker in place.workers]}


def _damaged(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"The state for {name} {what}: the record is damaged, so the place is not known. Restore an earlier checkpoint."
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
