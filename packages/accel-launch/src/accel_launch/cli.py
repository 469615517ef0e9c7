"""The command `accel`: finds the subcommand and turns its refusals into one message and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from accel_launch._version import __version__
from accel_launch.commands import described_commands, find_command
from accel_state.errors import AccelError

__all__ = ["main"]

_HEAD = "usage: accel COMMAND [arguments]\n\ncommands"
_TAIL = """\
examples
  accel launch train.py           run a script on all GPUs of this machine
  accel launch --help             its flags, more examples, exit codes
  accel env                       versions and devices, to paste into a report
  accel --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: what follows ``accel``; by default what this process was started with.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(_help(), file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"accel-launch {__version__}")
        return 0
    try:
        return find_command(words[0]).main(words[1:])
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    rows = [f"  {name:<12} {line}" for name, line in described_commands()]
    return "\n".join([_HEAD, *rows, "", _TAIL])
