"""The command `accel`: finds the subcommand, and turns its refusals, and an output that cannot be written, into one
message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from accel_launch._version import __version__
from accel_launch.commands import described_commands, find_command
from accel_state.errors import AccelError

__all__ = ["main"]

_BROKEN_PIPE = 141
"""What a shell reports of a program that a closed pipe ended."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:  # a service may have closed it
            sys.stdout.flush()  # here, where what fails can still be told
        return code
    except AccelError as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        _drop_output()
        return _BROKEN_PIPE  # of `accel ... | head`, which has seen enough
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        return _say(f"Writing failed ({error.strerror}). Free some space where the output goes, or move it.", 1)


def _run(words: list[str]) -> int:
    if not words:
        print(_help(), file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"accel-launch {__version__}")
        return 0
    return find_command(words[0]).main(words[1:])


def _say(problem: object, code: int) -> int:
    print(f"accel: {problem}", file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # perhaps what the problem is
        _drop_output()
    return code


def _reader_is_gone() -> bool:
    """Whether it is the standard output that nobody reads any more, and not some other pipe."""
    if sys.stdout is None:
        return False
    import select  # here: the launcher's start needs none of it

    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _drop_output() -> None:
    """The interpreter flushes once more as it ends, and would complain then."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _help() -> str:
    rows = [f"  {name:<12} {line}" for name, line in described_commands()]
    return "\n".join([_HEAD, *rows, "", _TAIL])
