"""What the journals of tools/soak.py say: whether a run that was killed and resumed equals one that was left alone.

Pure: events in, sentences out. An event is one line of a journal, as tools/soak_run.py writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Event", "Round", "parse", "problems", "steps_of"]

Event = Mapping[str, Any]
Round = Sequence[Event]
"""What one start of the run wrote, in order."""

_SHOWN = 5
"""Differences that are spelled out."""


def parse(text: str) -> list[Event]:
    """The events of a journal; a last line that has no end yet is left out."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(events: Round) -> list[int]:
    """Steps whose loss was written, in order."""
    return [event["step"] for event in events if event["event"] == "step"]


def problems(alone: Round, rounds: Sequence[Round], *, last_step: int) -> list[str]:
    """All that is not as it would be without the kills; empty where nothing is.

    Args:
        alone: the run that was left alone, from the first step to the last.
        rounds: each start of the run that was killed; the last one came to the end.
        last_step: of both.
    """
    found = []
    for name, events in (("that was left alone", alone), ("that was killed", [each for one in rounds for each in one])):
        missing = sorted(set(range(1, last_step + 1)) - set(steps_of(events)))
        if missing:
            found.append(f"the run {name} lacks {len(missing)} of {last_step} steps, such as step {missing[0]}")
    found += _different_losses(alone, rounds)
    found += _lost_progress(rounds)
    if not any(_resumed_at(events) for events in rounds):
        found.append("no start went on from a checkpoint, so nothing was shown: leave more time before a kill")
    hashes = {_weights(alone), _weights(rounds[-1])} if rounds else set()
    if len(hashes) != 1 or None in hashes:
        found.append(f"the final weights are {_weights(rounds[-1]) if rounds else None} and not {_weights(alone)}")
    return found


def _different_losses(alone: Round, rounds: Sequence[Round]) -> list[str]:
    """By their bits: 0.0 and -0.0 differ, and a loss that is no number equals one that is none either."""
    expected = {event["step"]: float(event["loss"]).hex() for event in alone if event["event"] == "step"}
    found, checked = [], 0
    for number, events in enumerate(rounds, 1):
        for event in events:
            if event["event"] != "step" or event["step"] not in expected:
                continue
            checked += 1
            if float(event["loss"]).hex() != expected[event["step"]]:
                found.append(
                    f"start {number}, which resumed at step {_resumed_at(events)}: the loss of step {event['step']} is "
                    f"{event['loss']!r} and not {float.fromhex(expected[event['step']])!r}"
                )
    more = len(found) - _SHOWN
    return [*found[:_SHOWN], f"{more} of {checked} losses more differ"] if more > 0 else found


def _lost_progress(rounds: Sequence[Round]) -> list[str]:
    """Starts that went on before a checkpoint of which the script had been told that it is complete."""
    found, saved = [], 0
    for number, events in enumerate(rounds, 1):
        resumed = _resumed_at(events)
        if resumed is not None and resumed < saved:
            found.append(f"start {number} resumed at step {resumed}, although step {saved} was saved before it")
        steps = steps_of(events)
        if resumed is not None and steps != list(range(resumed + 1, resumed + 1 + len(steps))):
            found.append(f"start {number} resumed at step {resumed} and took other steps than the next ones")
        saved = max([saved, *(event["step"] for event in events if event["event"] == "saved")])
    return found


def _resumed_at(events: Round) -> int | None:
    """The step that a start went on from; 0: from the beginning; ``None``: it was killed before it knew."""
    return next((event["step"] for event in events if event["event"] == "resumed"), None)


def _weights(events: Round) -> str | None:
    return next((event["weights"] for event in events if event["event"] == "ended"), None)
