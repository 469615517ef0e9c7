"""What is on the device, and what comes when: units fetched ahead of their use, and let go behind it."""

from __future__ import annotations

import concurrent.futures
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from accel_bigmodel.stream.device import Mark, Transfers
from accel_bigmodel.stream.order import Order
from accel_bigmodel.stream.source import Source
from accel_bigmodel.stream.staging import Staging
from accel_state.errors import ConfigError

__all__ = ["Engine", "Load"]

LOOK_AHEAD = 8
"""Units that are fetched ahead at most; the budget allows so many only where most of them are small."""


class Load:
    """One unit that the engine moves. It is known to the engine as long as somebody else holds it."""

    def __init__(self, engine: Engine, source: Source, name: str) -> None:
        self.engine = engine
        self.source = source
        self.name = name
        """For messages."""
        self.changes = [0] * len(source.layout.shapes)
        """How often each of its tensors was changed, as autograd has to know."""
        self.number = engine.add(self)

    def __del__(self) -> None:
        self.engine.forget(self.number)


@dataclass(slots=True)
class _Resident:
    """A unit that is on the device, or on its way."""

    flat: torch.Tensor
    stream: Hashable
    """Which one its memory was taken for."""
    arrival: Future[Mark] | Mark
    holders: int = 0
    awaited: bool = False


class Engine:
    """Moves units to one device just before they are used, while others compute.

    What is on the device at a time is no more than any `num_slots` units take that follow each other, unless more are
    in use at once. A unit's memory is taken from the allocator of the computing stream and given back to it, which
    costs a search in a list and never reaches the driver once every size has been seen; nothing ever empties that
    cache. Whoever still refers to such memory, as a saved tensor of autograd does, keeps it: the engine only lets go.

    Orders between the streams, all of which the device keeps and the host does not wait for:

    - A copy into fresh memory begins behind everything that was given to the computing stream till then, as its last
      user may still compute.
    - The computing stream waits for a unit's copy before it uses it.
    - A unit that was fetched for nothing is let go only once the computing stream waits for its copy, as the next user
      of the memory is on that stream.

    Args:
        transfers: the device.
        num_slots: units on the device at a time; with 1 nothing is fetched ahead.
        staging: for units that are not in pinned memory; made when the first one comes.
    """

    def __init__(self, transfers: Transfers, *, num_slots: int = 3, staging: Staging | None = None) -> None:
        if num_slots < 1:
            raise ConfigError(
                f"`num_slots={num_slots}` leaves no unit of the model a place on the device. Give 1 to fetch nothing "
                f"ahead, or 2 or 3 to copy while the device computes."
            )
        self.transfers = transfers
        self.num_slots = num_slots
        self._staging = staging
        self._order = Order()
        self._loads: WeakValueDictionary[int, Load] = WeakValueDictionary()
        self._sizes: dict[int, int] = {}
        """Bytes of each unit, in the order in which they were added."""
        self._budget: int | None = None
        self._resident: dict[int, _Resident] = {}
        """By number of the unit, the one used longest ago first."""
        self._writes: dict[int, Mark] = {}
        """Behind what is on its way from the device to the host, by number of the unit."""
        self._count = 0
        """Units that were added, ever."""
        self._forgotten: deque[int] = deque()
        self._lock = threading.Lock()  # autograd runs backward in a thread of its own

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """For other units on the same device."""
        made = Engine(self.transfers, num_slots=self.num_slots)
        memo[id(self)] = made
        return made

    def add(self, load: Load) -> int:
        """Its number. Called by `Load`."""
        with self._lock:
            number = self._count
            self._count += 1
            self._loads[number] = load
            self._sizes[number] = load.source.layout.num_bytes
            self._budget = None
            return number

    def forget(self, number: int) -> None:
        """A unit is no more. Called by `Load`, by the collector of garbage too, and so in any thread at any time."""
        self._forgotten.append(number)
        if self._lock.acquire(blocking=False):
            try:
                self._clear_forgotten()
            finally:
                self._lock.release()

    def acquire(self, load: Load) -> torch.Tensor:
        """The unit's bytes on the device, good for the current stream until `release`. Fetches what comes next.

        Raises:
            CheckpointError: if a file was cut short.
            OSError: if a file cannot be read.
        """
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            self._clear_forgotten()
            if _has_failed(self._resident.get(load.number)):
                self._let_go(load.number)  # ahead of its use: it may be there now, and the error is told if not
            resident = self._resident.pop(load.number, None)
            if resident is None:
                self._make_room(load.number, keep=())
                resident = self._fetch(load)
            self._resident[load.number] = resident
            resident.holders += 1
            self._order.saw(load.number)
            try:
                self._await(resident)
            except BaseException:
                self._let_go(load.number)
                raise
            if resident.stream != self.transfers.stream():
                self.transfers.share(resident.flat)
            self._fetch_ahead()
            return resident.flat

    def release(self, load: Load) -> None:
        """Nothing that will be given to the current stream uses the unit, unless it is acquired again."""
        with self._lock:
            resident = self._resident.get(load.number)
            if resident is not None:
                resident.holders -= 1

    def write_back(self, load: Load, index: int, value: torch.Tensor) -> None:
        """Keep `value`, a tensor on the device, as the unit's tensor `index`, once it has been computed.

        It counts from now on, but is on the host only after `settle`.
        """
        with self._lock, torch.no_grad():
            flat = value.detach().contiguous().view(-1).view(torch.uint8)
            host = load.source.writable(index).view(-1).view(torch.uint8)
            self.transfers.copy_after(self.transfers.computed())
            self.transfers.copy(host, flat)
            self._writes[load.number] = mark = self.transfers.copied()
            # `flat` is memory of the computing stream, whose next user must not come before the copy was made.
            self.transfers.compute_after(mark)

    def settle(self, load: Load) -> None:
        """Wait until the host has all that was written back of a unit. Called before the host reads it."""
        with self._lock:
            self._settle(load.number)

    def drop(self, load: Load) -> None:
        """What is on the device of a unit is out of date: it will be fetched again. Called after the host wrote it."""
        with self._lock:
            self._let_go(load.number)

    def close(self) -> None:
        """Let everything go and end the threads. It can be used again."""
        with self._lock:
            for number in list(self._resident):
                self._let_go(number)
            staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()

    @property
    def resident(self) -> list[str]:
        """Names of the units that are on the device or on their way, the one used longest ago first."""
        with self._lock:
            found = [self._loads.get(number) for number in self._resident]
        return [each.name for each in found if each is not None]

    @property
    def budget_bytes(self) -> int:
        """What any `num_slots` successive units take at most."""
        if self._budget is None:
            sizes = list(self._sizes.values())
            self._budget = max((sum(sizes[i : i + self.num_slots]) for i in range(len(sizes))), default=0)
        return self._budget

    def _clear_forgotten(self) -> None:
        while self._forgotten:
            number = self._forgotten.popleft()
            self._let_go(number)
            self._sizes.pop(number, None)
            self._budget = None
            self._writes.pop(number, None)

    def _fetch(self, load: Load) -> _Resident:
        source = load.source
        flat = self.transfers.device_bytes(source.layout.num_bytes)
        stream, begin_after = self.transfers.stream(), self.transfers.computed()
        pinned = source.pinned
        if pinned is not None:
            self.transfers.copy_after(begin_after)
            self.transfers.copy(flat, pinned)
            return _Resident(flat, stream, self.transfers.copied())
        self._settle(load.number)
        if self._staging is None:
            self._staging = Staging(self.transfers)
        return _Resident(flat, stream, self._staging.submit(source, flat, begin_after))

    def _settle(self, number: int) -> None:
        mark = self._writes.pop(number, None)
        if mark is not None:
            self.transfers.host_after(mark)

    def _await(self, resident: _Resident) -> None:
        """The current stream waits for the copy; the host only for what has not been read from a file yet."""
        if isinstance(resident.arrival, Future):
            resident.arrival = resident.arrival.result()
        self.transfers.compute_after(resident.arrival)
        resident.awaited = True

    def _fetch_ahead(self) -> None:
        if self.num_slots == 1:
            return
        guesses = self._order.following(LOOK_AHEAD, self._count)
        for position, number in enumerate(guesses):
            load = self._loads.get(number)
            if load is None or number in self._resident:
                continue
            if not self._make_room(number, keep=guesses[:position]):
                return
            self._resident[number] = self._fetch(load)

    def _make_room(self, number: int, *, keep: Sequence[int]) -> bool:
        """Let units go until one more fits, those that are needed latest first; False where that is not to be had."""
        room = self.budget_bytes - self._sizes[number]
        guesses = self._order.following(LOOK_AHEAD, self._count)
        while sum(self._sizes[n] for n in self._resident) > room:
            idle = [n for n, each in self._resident.items() if each.holders == 0 and n not in keep]
            if not idle:
                return False
            self._let_go(max(idle, key=lambda n: guesses.index(n) if n in guesses else len(guesses)))
        return True

    def _let_go(self, number: int) -> None:
        resident = self._resident.pop(number, None)
        if resident is None or resident.awaited:
            return
        # Nobody waited for the copy, and its memory must not have a next user before it is made.
        if isinstance(resident.arrival, Future):
            resident.arrival.cancel()
            concurrent.futures.wait([resident.arrival])
        self.transfers.compute_after(self.transfers.copied())
        if resident.stream != self.transfers.stream():
            self.transfers.share(resident.flat)


def _has_failed(resident: _Resident | None) -> bool:
    return resident is not None and isinstance(resident.arrival, Future) and resident.arrival.exception() is not None
