"""The command `accel launch`: from a command line to a plan, and to running it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accel_launch.flags import FLAGS, CommandLine, read_command_line
from accel_launch.host import inspect_host
from accel_launch.options import LaunchOptions
from accel_launch.plan import plan_launch
from accel_launch.run import run
from accel_state.config import did_you_mean
from accel_state.env import snapshot
from accel_state.errors import ConfigError

__all__ = ["HELP", "help_text", "main"]

HELP = "Start a script on one or several processes, on this machine or on several."

_USAGE = "usage: accel launch [flags] SCRIPT [arguments of the script]"

_EXAMPLES = """\
examples
  accel launch train.py --lr 0.1                     as many processes as there are GPUs
  accel launch --num-processes 4 --cpu train.py      four processes on the CPU
  accel launch --mixed-precision bf16 -m pkg.train   a module, in bf16
  accel launch --dry-run --num-processes 2 train.py  what would be started, and why
  accel launch --num-machines 2 --machine-rank 0 --main-process-ip 10.0.0.1 \\
      --main-process-port 29500 train.py             the first of two machines

Flags before SCRIPT are the launcher's, those after it the script's. They are written --num-processes 2,
--num-processes=2 or --num_processes 2.

exit codes
  that of the first process that failed; 128 + n if signal n ended it
  2 for a command line that cannot work; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP"""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: what follows ``accel launch``.

    Returns:
        The exit code.

    Raises:
        ConfigError: for a command line that cannot work.
    """
    line = read_command_line(argv)
    if line.given.pop("help", False):
        print(help_text())
        return 0
    dry_run = line.given.pop("dry_run", False)
    options = LaunchOptions(**line.given)
    script = _script(line)
    inherited = snapshot()
    _check_script(script, options, inherited.get("PATH"))
    plan = plan_launch(options, inspect_host(inherited), script, line.args)
    if dry_run:
        from accel_launch.explain import explain_plan

        print(explain_plan(plan))
        return 0
    return run(plan, inherited)


def help_text() -> str:
    """What ``accel launch --help`` prints."""
    lines = [_USAGE, "", HELP, ""]
    for group in dict.fromkeys(flag.group for flag in FLAGS):
        lines.append(group)
        for flag in FLAGS:
            if flag.group == group:
                first, *others = flag.help.splitlines()
                lines.append(f"  {flag.usage:<35} {first}")
                lines += [" " * 38 + other for other in others]
        lines.append("")
    return "\n".join([*lines, _EXAMPLES])


def _script(line: CommandLine) -> str:
    if line.script is None:
        raise ConfigError(
            "`accel launch` was given no script, so there is nothing to start. "
            "Write it after the flags, as in `accel launch --num-processes 2 train.py`."
        )
    return line.script


def _check_script(script: str, options: LaunchOptions, path: str | None) -> None:
    if options.module:
        return
    if options.no_python:
        import shutil  # loads compression modules, which no other launch needs

        if shutil.which(script, path=path) is None:
            raise ConfigError(
                f"`--no-python {script}` was given, but there is no program {script!r} on the PATH or at that path. "
                f"Correct its name, or leave `--no-python` out to run it as a Python script."
            )
        return
    if Path(script).exists():
        return
    folder = Path(script).parent
    if not folder.is_dir():
        raise ConfigError(
            f"The script `{script}` does not exist: neither does its folder `{folder}`, seen from `{Path.cwd()}`. "
            f"Correct the path, or use `-m` if it is the name of a module."
        )
    near = did_you_mean(Path(script).name, sorted(each.name for each in folder.glob("*.py")))
    raise ConfigError(
        f"The script `{script}` does not exist: there is no such file in `{folder.resolve()}`.{near} "
        f"Correct the path, or use `-m` if it is the name of a module."
    )
