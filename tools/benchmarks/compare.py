"""What is compared, how samples are taken in turns, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

__all__ = ["Comparison", "Outcome", "Sampler", "run"]

Sampler = Callable[[], float]
"""Takes one sample: seconds."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row: the same work done by several sides."""

    key: str
    """Number of the goal in the project's list, such as ``P7``."""
    title: str
    reference: str | None
    """What accel is compared with, a key of `samplers`. ``None``: with nothing, its time itself has a goal."""
    by: Literal["added", "ratio", "time"]
    """Whether the goal bounds what accel adds to the reference, how many times it takes, or its time itself."""
    goal: float
    """Upper bound: seconds, or a ratio."""
    samplers: Mapping[str, Callable[[], AbstractContextManager[Sampler]]]
    """By side, or by any other name of a reference: opens what takes samples, once a round."""
    starts_anew: bool = False
    """Whether every sample starts its processes anyway, so that one round is enough."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was measured of one comparison."""

    comparison: Comparison
    times: dict[str, float]
    """Median of each side, in seconds."""
    against: dict[str, float]
    """For each side the median, over the turns, of what it is judged by: see `Comparison.by`."""
    spread: tuple[float, float]
    """First and third quartile of that for accel."""
    failures: dict[str, str] = field(default_factory=dict)
    """Sides that could not be measured, and the last lines they said."""

    @property
    def meets_goal(self) -> bool:
        """Whether accel stays within the bound."""
        return self.against["accel"] <= self.comparison.goal


def run(comparison: Comparison, *, rounds: int, repeats: int, warm_up: bool = True) -> Outcome:
    """Let the sides take turns, the one that begins rotating, in fresh processes each round.

    One process may be faster than another that runs the same code, by where its memory came to lie; a median over
    the turns of several does not depend on one.
    """
    turns: list[dict[str, float]] = []
    failures: dict[str, str] = {}
    for _ in range(1 if comparison.starts_anew else rounds):
        with ExitStack() as stack:
            samplers: dict[str, Sampler] = {}
            for name, opened in comparison.samplers.items():
                if name in failures:
                    continue
                try:
                    sampler = stack.enter_context(opened())
                    if warm_up:
                        sampler()
                    samplers[name] = sampler
                except RuntimeError as error:
                    if name in ("accel", comparison.reference):
                        raise
                    failures[name] = str(error)
            names = list(samplers)
            for turn in range(repeats):
                first = turn % len(names)
                turns.append({name: samplers[name]() for name in names[first:] + names[:first]})
    return _outcome(comparison, turns, failures)


def _outcome(comparison: Comparison, turns: list[dict[str, float]], failures: dict[str, str]) -> Outcome:
    names = [name for name in comparison.samplers if name not in failures]
    judged = {name: sorted(_judge(comparison, turn, name) for turn in turns) for name in names}
    ours = judged["accel"]
    return Outcome(
        comparison=comparison,
        times={name: median(turn[name] for turn in turns) for name in names},
        against={name: median(values) for name, values in judged.items()},
        spread=(ours[len(ours) // 4], ours[-1 - len(ours) // 4]),
        failures=failures,
    )


def _judge(comparison: Comparison, turn: Mapping[str, float], name: str) -> float:
    if comparison.by == "time" or comparison.reference is None:
        return turn[name]
    reference = turn[comparison.reference]
    return turn[name] - reference if comparison.by == "added" else turn[name] / reference
