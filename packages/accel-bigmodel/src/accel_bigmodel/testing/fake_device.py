"""A device made of host memory that does copies late, and fails where a real one might read what is not there.

It is a stand-in: it shows that orders between streams are kept, and nothing about speed or any real driver. Computing
is torch on the CPU and takes place at once; copies wait in a queue. What ran before what is kept as a vector clock a
stream (Fidge 1988, Mattern 1989), so that a missing wait is found whether or not it did harm this time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from accel_bigmodel.stream.device import Mark
from accel_state.tree import tensor_leaves

__all__ = ["FakeTransfers", "RaceError"]

Clock = dict[Hashable, int]
Array = np.ndarray[Any, Any]
COPYING = "copying"


class RaceError(AssertionError):
    """On a real device, values could have been read before they arrived, or overwritten before they were read."""


@dataclass(slots=True)
class _Mark:
    clock: Clock
    number: int
    """Copies that were in the queue, ever."""


@dataclass(slots=True, eq=False)
class _Region:
    """Memory of the device. It goes to a new owner when nobody refers to it any more."""

    memory: Array
    owner: StorageWeakRef | None = None
    stream: Hashable = None
    shared: set[Hashable] = field(default_factory=set)
    read: Clock = field(default_factory=dict)
    written: Clock = field(default_factory=dict)


class FakeTransfers:
    """See `accel_bigmodel.stream.device.Transfers`.

    Args:
        copies: when they are made: ``"late"``, when somebody waits for them; ``"early"``, at once; ``"random"``.
        seed: of the random ones.
        pinned_bytes: of the host, in all.
    """

    def __init__(
        self,
        *,
        copies: Literal["late", "early", "random"] = "late",
        seed: int = 0,
        pinned_bytes: int | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        self.num_copies = 0
        """Made or in the queue."""
        self.copied_bytes = 0
        self.host_waits = 0
        self.peak_bytes = 0
        """Of the device's memory that somebody referred to at a time."""
        self._copies = copies
        self._random = random.Random(seed)
        self._pinned_left = pinned_bytes
        self._queue: list[tuple[Array, Array]] = []
        self._clocks: dict[Hashable, Clock] = {}
        self._computing: Hashable = "computing"
        self._regions: list[_Region] = []
        self._lock = threading.RLock()

    # What the engine asks for

    def device_bytes(self, num_bytes: int) -> torch.Tensor:
        """The memory that was given back last, of this size, or new memory; full of NaN."""
        with self._lock:
            self._collect()
            # Allocators keep what each stream gave back for that stream.
            free = [each for each in self._regions if each.owner is None and each.stream == self._computing]
            fits = [each for each in free if len(each.memory) == num_bytes]
            region = fits[-1] if fits else _Region(np.empty(num_bytes, dtype=np.uint8))
            self._regions = [*(each for each in self._regions if each is not region), region]
            region.memory.fill(0xFF)
            tensor = torch.from_numpy(region.memory)
            region.owner = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            region.stream, region.shared = self._computing, set()
            held = sum(len(each.memory) for each in self._regions if each.owner is not None)
            self.peak_bytes = max(self.peak_bytes, held)
            return tensor

    def host_bytes(self, num_bytes: int) -> torch.Tensor:
        """Ordinary memory, as much as `pinned_bytes` allows."""
        with self._lock:
            if self._pinned_left is not None:
                if num_bytes > self._pinned_left:
                    raise RuntimeError("the stand-in for a device has no more memory to pin")
                self._pinned_left -= num_bytes
            return torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device="cpu")

    def stream(self) -> Hashable:
        """See `Transfers`."""
        return self._computing

    def share(self, memory: torch.Tensor) -> None:
        """See `Transfers`."""
        region = self._region(memory)
        assert region is not None
        region.shared.add(self._computing)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfers`."""
        with self._lock:
            self._collect()
            clock = self._tick(COPYING)
            for tensor, is_written in ((source, False), (destination, True)):
                region = self._region(tensor)
                if region is not None:
                    self._use(region, COPYING, clock, is_written=is_written)
            self._queue.append((self._array(destination), self._array(source)))
            self.num_copies += 1
            self.copied_bytes += source.numel()
            if self._copies == "early" or (self._copies == "random" and self._random.random() < 0.5):
                self._run(self.num_copies)

    def copied(self) -> Mark:
        """See `Transfers`."""
        with self._lock:
            return _Mark(dict(self._clock(COPYING)), self.num_copies)

    def computed(self) -> Mark:
        """See `Transfers`."""
        with self._lock:
            return _Mark(dict(self._clock(self._computing)), 0)

    def copy_after(self, mark: Mark) -> None:
        """See `Transfers`."""
        self._wait(COPYING, mark)

    def compute_after(self, mark: Mark) -> None:
        """See `Transfers`."""
        self._wait(self._computing, mark)

    def host_after(self, mark: Mark) -> None:
        """See `Transfers`."""
        assert isinstance(mark, _Mark)
        with self._lock:
            self.host_waits += 1
            self._run(mark.number)

    # What tests ask for

    @contextmanager
    def on_stream(self, name: Hashable) -> Iterator[None]:
        """Another stream computes in here."""
        before, self._computing = self._computing, name
        self._clock(name).update(self._clock(before))  # as if it waited; what comes later is not ordered
        try:
            yield
        finally:
            self._computing = before

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look at every operation of this thread that reads or writes memory of the device.

        Raises:
            RaceError: where an operation is not behind the copy that brings what it reads.
        """
        with _Watch(self):
            yield

    @property
    def held_bytes(self) -> int:
        """Of the device's memory that somebody refers to."""
        with self._lock:
            self._collect()
            return sum(len(each.memory) for each in self._regions if each.owner is not None)

    def used(self, tensor: torch.Tensor, *, is_written: bool) -> None:
        """An operation of the computing stream was given `tensor`."""
        with self._lock:
            self._collect()
            region = self._region(tensor)
            if region is not None:
                stream = self._computing
                if stream != region.stream and stream not in region.shared:
                    raise RaceError(f"{stream!r} uses memory of {region.stream!r}, which may give it to somebody else")
                self._use(region, stream, self._tick(stream), is_written=is_written)

    def _use(self, region: _Region, stream: Hashable, clock: Clock, *, is_written: bool) -> None:
        known = dict(clock)
        for other, when in region.written.items():
            if known.get(other, 0) < when:
                raise RaceError(f"{stream!r} uses memory before {other!r} is known to have written it")
        if is_written:
            for other, when in region.read.items():
                if known.get(other, 0) < when:
                    raise RaceError(f"{stream!r} writes memory that {other!r} may still read")
        (region.written if is_written else region.read)[stream] = clock[stream]

    def _collect(self) -> None:
        """See which memory nobody refers to any more. Its next user is on the stream for which it was taken."""
        for region in self._regions:
            if region.owner is not None and region.owner.expired():  # type: ignore[no-untyped-call]
                region.owner = None
                known = self._clock(region.stream)
                for other in region.shared:  # the allocator itself waits for these
                    _merge(known, self._clock(other))
                for other, when in (*region.written.items(), *region.read.items()):
                    if known.get(other, 0) < when:
                        raise RaceError(f"memory of {region.stream!r} was given back while {other!r} may still use it")

    def _region(self, tensor: torch.Tensor) -> _Region | None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            return None
        address = tensor.untyped_storage().data_ptr()
        for region in self._regions:
            if region.owner is not None and len(region.memory) and region.memory.ctypes.data == address:
                return region
        return None

    def _array(self, tensor: torch.Tensor) -> Array:
        """Its bytes, without a reference to memory of the device: a copy under way keeps nothing alive."""
        region = self._region(tensor)
        if region is None:
            found: Array = tensor.numpy()
            return found
        begin = tensor.data_ptr() - region.memory.ctypes.data
        return region.memory[begin : begin + tensor.numel()]

    def _clock(self, stream: Hashable) -> Clock:
        return self._clocks.setdefault(stream, {})

    def _tick(self, stream: Hashable) -> Clock:
        clock = self._clock(stream)
        clock[stream] = clock.get(stream, 0) + 1
        return clock

    def _wait(self, stream: Hashable, mark: Mark) -> None:
        assert isinstance(mark, _Mark)
        with self._lock:
            self._collect()
            _merge(self._clock(stream), mark.clock)
            if stream != COPYING:
                self._run(mark.number)

    def _run(self, number: int) -> None:
        """Make the copies of the queue up to the one of this number."""
        while self._queue and self.num_copies - len(self._queue) < number:
            destination, source = self._queue.pop(0)
            destination[:] = source


def _merge(clock: Clock, other: Clock) -> None:
    for stream, when in other.items():
        clock[stream] = max(clock.get(stream, 0), when)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, device: FakeTransfers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        written: set[int] = set()
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.update(id(each) for each in tensor_leaves(value))
        is_view = not written and any(each.alias_info is not None for each in schema.returns)
        for tensor in () if is_view else tensor_leaves((args, kwargs)):
            self._device.used(tensor, is_written=id(tensor) in written)
        return func(*args, **kwargs)
