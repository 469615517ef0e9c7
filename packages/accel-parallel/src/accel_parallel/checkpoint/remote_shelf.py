"""The numbered checkpoints of a run in an object store. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from accel_parallel.checkpoint.layout import NUMBERED, refuse_limit
from accel_parallel.checkpoint.location import Location, as_location
from accel_parallel.checkpoint.manifest import MANIFEST_NAME
from accel_parallel.checkpoint.object_store import ObjectStore
from accel_parallel.checkpoint.remote import place_of, remove_leftovers
from accel_state.errors import CheckpointError

__all__ = ["RemoteShelf"]


class RemoteShelf:
    """Complete is what has a manifest; one listing tells."""

    def __init__(self, location: str) -> None:
        self._store = ObjectStore(location)

    @property
    def location(self) -> Location:
        return self._store.url

    def numbered(self, number: int) -> Location:
        return f"{self._store.url}/checkpoint_{number}"

    def holds(self, number: int) -> bool:
        return self._store.exists(f"checkpoint_{number}")

    def complete(self) -> list[tuple[int, Location]]:
        return [(number, self.numbered(number)) for number in _complete(self._objects())]

    def latest(self) -> Location | None:
        found = self._objects()
        complete = _complete(found)
        if complete:
            return self.numbered(complete[-1])
        # A crash of the very first save leaves files below their place, and nothing else.
        broken = [number for number, names in sorted(found.items()) if any(place_of(name) is None for name in names)]
        if broken:
            raise CheckpointError(
                f"`{self.location}` holds {', '.join(f'checkpoint_{number}' for number in broken)}, and none of them "
                f"has a `{MANIFEST_NAME}`, so none is complete. Restore one from a backup, or remove them to start "
                f"anew."
            )
        return None

    def next_number(self) -> int:
        return max(self._objects(), default=-1) + 1

    def prune(self, *, total_limit: int, keep: Iterable[Location] = ()) -> list[Location]:
        """As of a `Shelf`; also removes what saves that are gone left in any of the checkpoints."""
        refuse_limit(total_limit)
        protected = {str(as_location(each)) for each in keep}
        found = self._objects()
        complete = _complete(found)
        oldest = complete[: max(0, len(complete) - total_limit)]
        surplus = [number for number in oldest if self.numbered(number) not in protected]
        for number in surplus:
            name = f"checkpoint_{number}"
            # First what makes it a checkpoint: half of one must never look whole.
            self._store.remove([f"{name}/{MANIFEST_NAME}"])
            self._store.remove([f"{name}/{each}" for each in found.pop(number) if each != MANIFEST_NAME])
        for number, names in found.items():
            places = {place_of(name) for name in names} - {None}
            if len(places) > (MANIFEST_NAME in names):
                remove_leftovers(ObjectStore(str(self.numbered(number))), names)
        return [self.numbered(number) for number in surplus]

    def _objects(self) -> dict[int, list[str]]:
        """For each number, what lies below it."""
        found: dict[int, list[str]] = {}
        for name in self._store.names():
            folder, slash, rest = name.partition("/")
            match = NUMBERED.fullmatch(folder)
            if match and slash:
                found.setdefault(int(match[1]), []).append(rest)
        return found


def _complete(found: dict[int, list[str]]) -> list[int]:
    return sorted(number for number, names in found.items() if MANIFEST_NAME in names)
