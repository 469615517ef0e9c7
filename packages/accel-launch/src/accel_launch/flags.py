"""The flags of `accel launch` as a table, and how a command line is read by it.

Every flag before the script is the launcher's; everything after it is the script's, untouched. Names are
written with dashes or underscores, never shortened, so that a flag added later cannot change what a
command line means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from accel_state.config import MixedPrecision, did_you_mean
from accel_state.errors import ConfigError

__all__ = ["FLAGS", "CommandLine", "Flag", "read_command_line"]

_NUMBERS: dict[str, tuple[type[int] | type[float], str]] = {
    "N": (int, "a whole number"),
    "PORT": (int, "a whole number"),
    "SECONDS": (float, "a number"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag."""

    name: str
    """Name with dashes, without the two in front. With underscores it is the field of `LaunchOptions`."""
    group: str
    """Heading under which the help shows it."""
    help: str
    """What it does, in a line or two."""
    value: str | None = None
    """Name of its value in the help, which also says what it is: N, PORT, SECONDS, or a text. ``None``: no value."""
    choices: tuple[str, ...] = ()
    """All values it takes, where they can be counted."""
    short: str | None = None
    """Spelling with one dash."""

    @property
    def field(self) -> str:
        """Field of `LaunchOptions` that it sets."""
        return self.name.replace("-", "_")

    @property
    def usage(self) -> str:
        """How it is written, as the help shows it."""
        short = f"{self.short}, " if self.short else ""
        return f"{short}--{self.name}" + (f" {self.value}" if self.value else "")

    def read(self, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            ConfigError: if it stands for none.
        """
        if self.choices and text not in self.choices:
            raise ConfigError(
                f"`--{self.name} {text}` is not a value it takes.{did_you_mean(text, list(self.choices))} "
                f"Give one of {', '.join(self.choices)}."
            )
        if self.value not in _NUMBERS:
            return text
        kind, what = _NUMBERS[self.value]
        try:
            return kind(text)
        except ValueError:
            raise ConfigError(
                f"`--{self.name} {text}`: {text!r} is not {what}, which the flag needs. "
                f"Write it as in `--{self.name} {4 if kind is int else 600}`."
            ) from None


_PROCESSES, _TRAINING, _MACHINES = "processes", "training", "several machines (start it on each of them)"
_FAULTS, _STARTED = "output and faults", "what is started"

FLAGS: tuple[Flag, ...] = (
    Flag(
        name="num-processes",
        group=_PROCESSES,
        value="N",
        help="Processes over all machines (default: one a CUDA device, else one).",
    ),
    Flag(name="cpu", group=_PROCESSES, help="Run on the CPU, whatever devices there are."),
    Flag(
        name="multi-gpu", group=_PROCESSES, help="Require a CUDA device for each of several processes, or do not start."
    ),
    Flag(
        name="num-cpu-threads-per-process",
        group=_PROCESSES,
        value="N",
        help="Set OMP_NUM_THREADS (default, with several processes: an equal part of the\n"
        "cores, unless the variable is set).",
    ),
    Flag(
        name="mixed-precision",
        group=_TRAINING,
        value="|".join(get_args(MixedPrecision)),
        choices=get_args(MixedPrecision),
        help="Dtype in which the forward pass computes.",
    ),
    Flag(
        name="gradient-accumulation-steps",
        group=_TRAINING,
        value="N",
        help="Micro-batches whose gradients make one optimizer step.",
    ),
    Flag(name="project-dir", group=_TRAINING, value="DIR", help="Folder for checkpoints and metrics."),
    Flag(name="num-machines", group=_MACHINES, value="N", help="How many there are (default: 1)."),
    Flag(name="machine-rank", group=_MACHINES, value="N", help="Which one this is, from 0."),
    Flag(name="main-process-ip", group=_MACHINES, value="ADDRESS", help="Address of machine 0."),
    Flag(
        name="main-process-port",
        group=_MACHINES,
        value="PORT",
        help="TCP port of rank 0 (default, on one machine: a free one).",
    ),
    Flag(
        name="debug",
        group=_FAULTS,
        help="Before each collective compare shapes and dtypes over all ranks, and name\nthe rank that differs.",
    ),
    Flag(
        name="timeout",
        group=_FAULTS,
        value="SECONDS",
        help="How long a collective waits for its peers (default: 1800).",
    ),
    Flag(
        name="grace-period",
        group=_FAULTS,
        value="SECONDS",
        help="After Ctrl-C, SIGTERM or SIGHUP: how long processes have to end by\n"
        "themselves, a last checkpoint included (default: 1.4).",
    ),
    Flag(
        name="log-dir",
        group=_FAULTS,
        value="DIR",
        help="Also write each rank's whole output to DIR/rank<N>.stdout.log and\n"
        ".stderr.log, tracebacks that the terminal is spared included.",
    ),
    Flag(
        name="dry-run",
        group=_FAULTS,
        help="Print the plan (commands, environment, every setting with its value and\nsource) and start nothing.",
    ),
    Flag(name="quiet", short="-q", group=_FAULTS, help="No words of the launcher's own after a failure."),
    Flag(name="module", short="-m", group=_STARTED, help="SCRIPT is the name of a module, as for python -m."),
    Flag(name="no-python", group=_STARTED, help="SCRIPT is a program, started as it is."),
    Flag(name="help", short="-h", group=_STARTED, help="Show this."),
)
"""Every flag, in the order of the help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """A command line, read."""

    given: dict[str, Any]
    """What was given, by field: of `LaunchOptions`, and ``dry_run`` and ``help``."""
    script: str | None
    """The script; ``None`` where there is none."""
    args: tuple[str, ...]
    """What follows it."""


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Read what follows ``accel launch``. Pure.

    Raises:
        ConfigError: at a flag that does not exist (the nearest is named), that lacks its value or has one
            too many, or that is given twice with different values.
    """
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        name, equals, text = word.partition("=")
        flag = _find(name)
        value: Any
        if flag.value is None:
            if equals:
                raise ConfigError(f"`{word}`: `{name}` is on when it is given, and takes no value. Write `{name}`.")
            value = True
        else:
            if not equals:
                if not rest:
                    raise ConfigError(
                        f"`{name}` is the last word of the command line, but it needs a value. "
                        f"Write `--{flag.name} {flag.value}` and then the script."
                    )
                text = rest.pop(0)
            value = flag.read(text)
        if flag.field in given and given[flag.field] != value:
            raise ConfigError(
                f"`--{flag.name}` was given twice, as {given[flag.field]} and as {value}, and it can be only one. "
                f"Remove one of them."
            )
        given[flag.field] = value
    return CommandLine(given=given, script=rest[0] if rest else None, args=tuple(rest[1:]))


def _find(word: str) -> Flag:
    for flag in FLAGS:
        if word == flag.short or word.replace("_", "-") == f"--{flag.name}":
            return flag
    known = [f"--{flag.name}" for flag in FLAGS]
    raise ConfigError(
        f"`{word}` is not a flag of `accel launch`.{did_you_mean(word.replace('_', '-'), known)} "
        f"Flags of the script itself go after the script; `accel launch --help` lists the launcher's."
    )
