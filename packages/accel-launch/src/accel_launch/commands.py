"""Subcommands of `accel`: two of its own, and those that other packages bring.

A package adds one by an entry point of the group `accel.commands`, which names a module (or any object) that is a
`Command`. That module is imported for ``accel --help`` too, so it loads what is heavy inside `main` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["BUILT_IN", "GROUP", "Command", "described_commands", "find_command"]

GROUP = "accel.commands"
"""Entry-point group in which packages register subcommands."""

BUILT_IN: dict[str, str] = {"launch": "accel_launch.launch", "env": "accel_launch.env_report"}
"""Subcommands that are found without looking at what else is installed, by the module of each."""


class Command(Protocol):
    """What an entry point of the group must be: a module with these two names will do."""

    HELP: str
    """What it does, in one line."""

    def main(self, argv: Sequence[str]) -> int:
        """Run it with the words that follow its name, and return the exit code."""
        ...


def find_command(name: str) -> Command:
    """The subcommand of that name.

    Raises:
        ConfigError: if there is none (the nearest is named), or it cannot be imported.
    """
    if name in BUILT_IN:
        return cast(Command, import_module(BUILT_IN[name]))
    points = _entry_points()
    if name not in points:
        known = [*BUILT_IN, *points]
        raise ConfigError(
            f"`accel {name}` is not a command.{did_you_mean(name, known)} "
            f"The commands here are {', '.join(known)}; other packages of ours bring more."
        )
    try:
        return cast(Command, points[name].load())
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"`accel {name}` is brought by {_bringer(points[name])}, which cannot be imported here ({error}). "
            f"Install it again, or what it lacks."
        ) from error


def described_commands() -> list[tuple[str, str]]:
    """Every subcommand and its one line of help, those that cannot be imported included."""
    return [(name, _describe(name)) for name in [*BUILT_IN, *sorted(_entry_points())]]


def _describe(name: str) -> str:
    try:
        return find_command(name).HELP
    except ConfigError as error:
        return f"(not usable: {error.__cause__})"


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}


def _bringer(point: EntryPoint) -> str:
    return f"the package {point.dist.name!r}" if point.dist is not None else f"`{point.value}`"
