"""Why a candidate was chosen, and why the nearest others were not, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from accel_parallel.auto.layout import Layout
from accel_parallel.auto.plan import Candidate
from accel_parallel.auto.text import gib, largest_parts, time_parts

__all__ = ["reasons_for"]


def reasons_for(
    chosen: Candidate, candidates: Sequence[Candidate], *, neighbours: Iterable[Layout] | None = None
) -> tuple[str, ...]:
    """One sentence for the chosen one, and one for each of its neighbours.

    Args:
        chosen: the first of `candidates`.
        candidates: those that fit first, faster ones first.
        neighbours: what one would have expected instead; ``None``: what is simpler or differs in one setting.
    """
    fitting = sum(candidate.fits for candidate in candidates)
    tied = sum(each.fits and each.time.per_sample_s == chosen.time.per_sample_s for each in candidates) > 1
    why = "the simplest of the fastest" if tied else "the fastest"
    only = f"{chosen.layout} is {why} of {fitting} that fit" if fitting > 1 else f"{chosen.layout} is all that fits"
    first = f"{only}, of {len(candidates)} candidates: {1 / chosen.time.per_sample_s:,.1f} samples a second."
    known = {candidate.layout: candidate for candidate in candidates}
    others: dict[Layout, Candidate] = {}
    for layout in _neighbours(chosen.layout, candidates) if neighbours is None else neighbours:
        if layout != chosen.layout and layout in known:
            others.setdefault(layout, known[layout])
    return (first, *(_why_not(chosen, other) for other in others.values()))


def _neighbours(layout: Layout, candidates: Sequence[Candidate]) -> Iterator[Layout]:
    """What one would have expected instead: simpler ones, those that differ in one setting, and the next best."""
    yield Layout(strategy="single" if layout.world_size == 1 else "ddp", replicate=layout.world_size)
    if layout.strategy == "fsdp":
        for settings in ({"offload": False}, {"checkpointing": False}, {"reshard": not layout.reshard}):
            yield replace(layout, **settings)  # type: ignore[arg-type]
        if layout.tp > 1 or layout.replicate > 1:
            yield replace(layout, tp=1, replicate=1, shard=layout.world_size)
    else:
        yield replace(layout, checkpointing=not layout.checkpointing)
    yield from (each.layout for each in candidates[1:2] if each.fits)


def _why_not(chosen: Candidate, other: Candidate) -> str:
    if not other.fits:
        memory = other.memory
        host = f", and {gib(memory.host_bytes)} of host memory" if memory.host_bytes else ""
        return (
            f"{other.layout} does not fit: {gib(memory.total)} a process at the {memory.moment}{host} "
            f"({largest_parts(memory)})."
        )
    slower = other.time.per_sample_s / chosen.time.per_sample_s - 1.0
    shown = f"{slower:.1%}" if slower >= 0.0005 else "less than 0.1%"
    if slower == 0.0:
        return f"{other.layout} is as fast, and less simple."
    ours, theirs = time_parts(chosen.time), time_parts(other.time)
    name, more = max(((name, theirs[name] - ours[name]) for name in ours), key=lambda part: part[1])
    share = more / chosen.time.per_sample_s
    return f"{other.layout} fits, but is predicted {shown} slower ({name}: {share:+.1%})."
