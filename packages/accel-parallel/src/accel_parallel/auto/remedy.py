"""What would help where nothing fits. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from accel_parallel.auto.plan import Candidate
from accel_parallel.auto.search import Search
from accel_parallel.auto.text import gib, largest_parts

__all__ = ["refusal"]

_MOST_DEVICES = 65_536
"""Beyond which nobody is told to launch more."""


def refusal(search: Search, world_size: int, candidates: Sequence[Candidate]) -> str:
    """The error of a run that fits nowhere: what was asked, how much is missing, and what to change."""
    least = min(candidates, key=lambda each: each.memory.total)
    memory, work = least.memory, search.work
    length = "" if search.profile.sequence_length is None else f" of {work.sequence_length:,} tokens"
    where = f"{world_size} x {search.hardware.name}"
    asked = f"`{search.profile.name}` with `batch_size={work.batch_size}`{length} on {where}"
    missing = (
        f"the least predicted is {gib(memory.total)} a process ({least.layout}; at the {memory.moment}: "
        f"{largest_parts(memory)}), and {gib(search.limit_bytes)} of {gib(search.hardware.memory_bytes)} may be used"
    )
    if memory.total <= search.limit_bytes:
        missing += f"; that plan needs {gib(memory.host_bytes)} of host memory for each process, more than there is"
    return f"No plan fits {asked}: {missing}. {_advice(search, world_size)}"


def _advice(search: Search, world_size: int) -> str:
    work = search.work
    found = []
    devices = _enough_devices(search, world_size)
    if devices is not None:
        found.append(f"launch {devices:,} devices")
    batch = _largest(work.batch_size, lambda size: replace(search, work=replace(work, batch_size=size)), world_size)
    if batch is not None:
        found.append(f"set `batch_size={batch}` and accumulate gradients")
    if devices is None and batch is None:
        found += _both(search, world_size)
    if search.profile.sequence_length is not None:
        length = _largest(
            work.sequence_length, lambda size: replace(search, work=replace(work, sequence_length=size)), world_size
        )
        if length is not None:
            found.append(f"cut sequences to {length:,} tokens, or divide them with `cp_size`")
    if not search.offload and search.hardware.host is not None and _fits(replace(search, offload=True), world_size):
        found.append("let parameters be offloaded")
    if not found:
        return (
            "Neither more devices nor smaller batches would be enough: freeze parameters, store them in a lower "
            "precision, or use devices with more memory."
        )
    return f"To make it fit, {', or '.join(found)}."


def _both(search: Search, world_size: int) -> list[str]:
    """More devices and smaller batches, where neither alone is enough."""
    world = max(_MOST_DEVICES, world_size) // search.hardware.devices_per_node * search.hardware.devices_per_node
    present = search.work.batch_size
    batch = _largest(present, lambda size: replace(search, work=replace(search.work, batch_size=size)), world)
    if batch is None:
        return []
    smaller = replace(search, work=replace(search.work, batch_size=batch))
    return [f"launch {_enough_devices(smaller, world_size):,} devices and set `batch_size={batch}`"]


def _fits(search: Search, world_size: int) -> bool:
    """Whether any plan fits that divides the model as far as it goes: others need no less."""
    return any(
        search.fits(search.memory(layout), world_size)
        for layout in search.layouts(world_size)
        if layout.replicate == 1 or layout.strategy != "fsdp"
    )


def _enough_devices(search: Search, world_size: int) -> int | None:
    """The fewest devices, in whole nodes beyond the first, that are enough; ``None`` if no number is."""
    node = search.hardware.devices_per_node
    unit = node if world_size >= node else 1
    low, high = world_size // unit, 2 * max(1, world_size // unit)
    while not _fits(search, high * unit):
        if high * unit >= _MOST_DEVICES:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(search, middle * unit) else (middle, high)
    return high * unit


def _largest(present: int, at: Callable[[int], Search], world_size: int) -> int | None:
    """The largest size below `present` that fits; ``None`` if not even 1 does."""
    low, high = 0, present
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(at(middle), world_size) else (low, middle)
    return low or None
