"""The command `accel checkpoint`: what there is, whether it is intact, and what can be made of it.

==============  ==============================================================
`ls`            checkpoints of a run, and what unfinished saves left
`show`          what is in one
`verify`        every file proved
`diff`          two compared, tensor by tensor
`consolidate`   the weights as other programs read them
`convert`       accelerate's folders and torch's distributed checkpoints, read
`prune`         old ones removed
`places`        which folders hold checkpoints
`arguments`     command lines
`text`          sizes, ages and tables
`progress`      a bar of bytes
==============  ==============================================================

None of them needs a run, a process group or a device. What does not read tensors does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from accel_state.config import did_you_mean
from accel_state.errors import CheckpointError, ConfigError

__all__ = ["COMMANDS", "HELP", "main"]

HELP = "List, prove, compare, export, convert and remove checkpoints."

COMMANDS = {
    "ls": "List the checkpoints of a run.",
    "show": "Show what is in a checkpoint.",
    "verify": "Prove that every file is what was written.",
    "diff": "Compare two checkpoints, tensor by tensor.",
    "consolidate": "Write the weights of a model as other programs read them.",
    "convert": "Read a checkpoint of accelerate or of torch.distributed.checkpoint.",
    "prune": "Remove old checkpoints, and what dead processes left.",
}
"""What each command does, in one line. A module of the same name runs it."""

_TAIL = """\
examples
  accel checkpoint ls runs/7b
  accel checkpoint verify runs/7b/checkpoints/checkpoint_12
  accel checkpoint consolidate runs/7b exported --dtype bfloat16
  accel checkpoint prune runs/7b --keep 3 --dry-run

exit codes
  0  done, or nothing differs    1  damage or a difference was found
  2  could not be done           130  interrupted

`accel checkpoint COMMAND --help` says more of each."""


class _Module(Protocol):
    def main(self, argv: Sequence[str]) -> int: ...


def main(argv: Sequence[str]) -> int:
    """Run one of the commands and return the exit code.

    Args:
        argv: what follows ``accel checkpoint``.

    Raises:
        ConfigError: if the words make no sense.
        CheckpointError: if it could not be done.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] not in COMMANDS:
        raise ConfigError(
            f"`accel checkpoint {words[0]}` is not a command.{did_you_mean(words[0], list(COMMANDS))} "
            f"Use one of {', '.join(COMMANDS)}."
        )
    module = cast(_Module, import_module(f"{__name__}.{words[0]}"))
    try:
        return module.main(words[1:])
    except BrokenPipeError:  # a reader that went away is no fault
        raise
    except OSError as error:
        raise CheckpointError(
            f"`accel checkpoint {words[0]}` could not go on ({error}). Correct that, then run it again: what it was "
            f"writing has not taken its name."
        ) from error


def _help() -> str:
    rows = [f"  {name:<12} {line}" for name, line in COMMANDS.items()]
    return "\n".join(["usage: accel checkpoint COMMAND [arguments]\n\ncommands", *rows, "", _TAIL])
