"""Batches on their way to the device while the step runs.

The copy of the next batch is enqueued on a stream of its own when the loop asks for a batch, before it gets the
one that is ready. A generator has no other moment: it runs only while it is asked. Let *load* be the time of
getting a batch from the loader, *copy* that of its copy, *step* that of the device's work:

* A loop that lets the device run behind asks early. The device then works on batch s - 1 while the host gets batch
  s + 1, and the copy of that one runs beside step s: the period is max(load, copy, step).
* A loop that waits for the device in each step, as ``loss.item()`` does, finds the device idle when it asks.
  Workers have loaded batch s + 1 by then if loading is faster than the step, and the copy of batch s is done: the
  period is the step's. If loading is slower, the device waits for workers either way, and the period is the load's.

The price is one load more before the first batch. No thread is used: the dataset is read where it always is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from accel_state.device import DEVICES
from accel_state.tree import map_tensors, send_to_device

__all__ = ["SideStream", "moves", "overlapped", "pin_wanted", "side_stream"]

N = TypeVar("N")

_STREAM_FUNCTIONS = ("Stream", "Event", "current_stream", "stream")
"""What ``torch.<type>`` has where a device type has streams; those of CUDA's shape all do."""
_IN_FLIGHT = 2
"""Copies that may be unfinished at once: that of the batch handed out, and that of the next one."""


def moves(device: torch.device | None) -> bool:
    """Whether batches have to be moved at all. Where not, `overlapped` is not needed."""
    return device is not None and device.type != "cpu"


def pin_wanted(device: torch.device | None, non_blocking: bool | None) -> bool:
    """Whether the loader's batches should be pinned, since copies overlap with the host from pinned memory only.

    Args:
        device: where batches are moved to; ``None`` leaves them where they are.
        non_blocking: as for `overlapped`.
    """
    return non_blocking is not False and moves(device) and _stream_module(device) is not None


def overlapped(
    steps: Iterable[tuple[Any, N]],
    device: torch.device,
    *,
    non_blocking: bool | None,
    side: SideStream | None = None,
) -> Iterator[tuple[Any, N]]:
    """The pairs with the batch on `device`, one copy ahead. Called by a loader for each iteration.

    What is on the device already stays the very same object, and so does a batch that is ``None``. An error in
    getting or copying a batch is raised where that batch would be handed out, after the one before. Closing the
    generator closes `steps`.

    Memory of a batch is given back once the device is done with it, not the host: a host that runs many steps ahead of
    the device keeps their batches there.

    Args:
        steps: pairs of a batch and what belongs to it, which stays.
        device: where to; not the CPU.
        non_blocking: ``None`` looks ahead wherever the device has streams; ``True`` too, and asks for copies that do
            not wait where it has none; ``False`` copies each batch when it is handed out, and waits.
        side: the stream to copy on, as `side_stream` gives it. Memory is kept for each stream, so one that lives as
            long as the loader needs less of it than one an iteration, which is made where none is given.
    """
    if non_blocking is False:
        return _in_turn(steps, device, non_blocking=False)
    side = side or side_stream(device)
    return _in_turn(steps, device, non_blocking=non_blocking is True) if side is None else _ahead(steps, side)


def side_stream(device: torch.device) -> SideStream | None:
    """A new stream for copies to `device`; ``None`` where that type of device has no streams of its own."""
    module = _stream_module(device)
    return None if module is None else SideStream(device, module)


class SideStream:
    """A stream on which copies run beside the step.

    Args:
        device: where copies go.
        module: has ``Stream``, ``Event``, ``current_stream`` and ``stream``, as ``torch.cuda`` does.
    """

    def __init__(self, device: torch.device, module: ModuleType | Any) -> None:
        self.device = torch.device(device.type, module.current_device()) if device.index is None else device
        self._module = module
        self._stream = module.Stream(device=self.device)

    def copy(self, batch: Any) -> tuple[Any, Any]:
        """`batch` on the device once the event that comes with it has happened."""
        # The source is memory of the host, so the copy need not wait for anything that the device does now.
        with self._module.stream(self._stream):
            moved = send_to_device(batch, self.device, non_blocking=True)
            event = self._module.Event()
            event.record(self._stream)
        return moved, event

    def hand_over(self, moved: Any, event: Any, untouched: frozenset[int]) -> None:
        """Let the stream that is current now, the one of the step, use what was copied.

        Its work waits for the copy, and the memory is not given away before that work is done: it was allocated
        on the side stream, which knows nothing of the step.
        """
        current = self._module.current_stream(self.device)
        current.wait_event(event)
        for leaf in _leaves(moved):
            # An object that moved itself may be the very same one and hold other tensors now.
            stayed = isinstance(leaf, torch.Tensor) and id(leaf) in untouched
            if not stayed and hasattr(leaf, "record_stream"):
                leaf.record_stream(current)

    def carries(self, batch: Any) -> bool:
        """Whether everything in `batch` can be handed over, and comes from the host."""
        return all(self._carries_leaf(leaf) for leaf in _leaves(batch))

    def _carries_leaf(self, leaf: Any) -> bool:
        if not isinstance(leaf, torch.Tensor):
            # An object that moves itself hides its tensors, unless it hands them over itself.
            return not callable(getattr(leaf, "to", None)) or hasattr(leaf, "record_stream")
        if leaf.layout != torch.strided or leaf.is_nested or is_traceable_wrapper_subclass(leaf):
            return False
        return leaf.device.type == "cpu" or leaf.device == self.device


@dataclass(slots=True)
class _Ahead(Generic[N]):
    """One pair that was pulled ahead."""

    batch: Any
    """On the device if there is an `event`, else where it came from."""
    note: N
    event: Any = None
    sources: tuple[Any, ...] = ()
    """Tensors that are read until the event has happened."""

    def taken(self, side: SideStream) -> Any:
        """The batch for the step; it is forgotten here, so that the memory is the step's to give back."""
        batch, self.batch = self.batch, None
        if self.event is None:
            return batch if batch is None else send_to_device(batch, side.device)
        side.hand_over(batch, self.event, frozenset(map(id, self.sources)))
        return batch


def _ahead(steps: Iterable[tuple[Any, N]], side: SideStream) -> Iterator[tuple[Any, N]]:
    source = iter(steps)
    in_flight: deque[_Ahead[N]] = deque()
    current: _Ahead[N] | Exception | None
    try:
        following = _pull(source, side, in_flight)
        while following is not None:
            current, following = following, None
            if isinstance(current, Exception):
                raise current
            following = _pull(source, side, in_flight)
            yield current.taken(side), current.note
    finally:
        current = None  # an error holds this frame
        for each in in_flight:
            each.event.synchronize()
        _close(source)


def _pull(
    source: Iterator[tuple[Any, N]], side: SideStream, in_flight: deque[_Ahead[N]]
) -> _Ahead[N] | Exception | None:
    """The next pair, its copy under way; the error that came instead; ``None`` at the end."""
    try:
        pair = next(source, None)
        if pair is None:
            return None
        batch, note = pair
        if batch is None or not side.carries(batch):
            return _Ahead(batch, note)
        while len(in_flight) >= _IN_FLIGHT:
            in_flight.popleft().event.synchronize()
        sources = tuple(_leaves(batch))
        moved, event = side.copy(batch)
    except Exception as error:  # any: it is raised as it is, one batch later
        return error
    pulled = _Ahead(moved, note, event, sources)
    in_flight.append(pulled)
    return pulled


def _in_turn(steps: Iterable[tuple[Any, N]], device: torch.device, *, non_blocking: bool) -> Iterator[tuple[Any, N]]:
    source = iter(steps)
    try:
        for batch, note in source:
            yield batch if batch is None else send_to_device(batch, device, non_blocking=non_blocking), note
    finally:
        _close(source)


def _leaves(tree: Any) -> list[Any]:
    """Tensors of `tree`, and the other leaves."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    found: list[Any] = []

    def note(leaf: Any, path: str = "") -> Any:
        found.append(leaf)
        return leaf

    map_tensors(tree, note, on_other=note)
    return found


def _close(source: Iterator[Any]) -> None:
    """End a generator now rather than when it is collected."""
    close = getattr(source, "close", None)
    if callable(close):
        close()


def _stream_module(device: torch.device | None) -> ModuleType | None:
    kind = None if device is None else DEVICES.get(device.type)
    module = None if kind is None or kind.type == "cpu" else kind.module
    return module if all(hasattr(module, name) for name in _STREAM_FUNCTIONS) else None
