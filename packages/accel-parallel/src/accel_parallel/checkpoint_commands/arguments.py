"""Command lines of the checkpoint commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from accel_parallel.checkpoint_commands import COMMANDS
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["Arguments", "size_in_bytes", "whole_number"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Arguments(argparse.ArgumentParser):
    """Arguments of one command. Flags are never shortened, so that one added later changes no command line."""

    def __init__(self, command: str, *, notes: str) -> None:
        """
        Args:
            command: its name.
            notes: what the help ends with: how it behaves, and examples.
        """
        super().__init__(
            prog=f"accel checkpoint {command}",
            description=COMMANDS[command],
            epilog=notes,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def read(self, argv: Sequence[str]) -> argparse.Namespace | None:
        """What was asked for; ``None`` where that was help, which is printed.

        Raises:
            ConfigError: if the words make no sense.
        """
        if any(word in ("-h", "--help") for word in argv):
            print(self.format_help().rstrip())
            return None
        return self.parse_args(list(argv))

    def error(self, message: str) -> NoReturn:
        odd = re.match(r"unrecognized arguments: (-\S+)", message)
        known = [flag for action in self._actions for flag in action.option_strings]
        hint = did_you_mean(odd[1].partition("=")[0], known) if odd else ""
        raise ConfigError(f"`{self.prog}`: {message}.{hint} `{self.prog} --help` shows what it takes.")


def whole_number(least: int) -> type[int]:
    """A type for arguments: a whole number of at least `least`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return read  # type: ignore[return-value] # argparse takes any callable, and names no type for one


def size_in_bytes(text: str) -> int:
    """A size as users write it, such as ``5GB`` or ``512MiB``; a number alone is bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = found[2].upper() or "B" if found else ""
    if found is None or unit not in _UNITS or int(float(found[1]) * _UNITS[unit]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, which is written as 5GB or 512MiB")
    return int(float(found[1]) * _UNITS[unit])
