"""Executes a launch plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from accel_launch.plan import LaunchPlan

__all__ = ["run"]


def run(plan: LaunchPlan, inherited: Mapping[str, str]) -> int:
    """Start what is planned and wait for it. The exit code is that of the first process that failed.

    One process replaces this one, and then nothing is returned: signals, terminal and exit code are its own.

    Args:
        plan: what `plan_launch` made.
        inherited: the environment that the processes get beside what is planned.

    Raises:
        ConfigError: if the port that rank 0 was to have is taken.
    """
    if plan.replaces_launcher:
        _replace_launcher(plan, inherited)
    from accel_launch.backends.local import run_local

    with _with_port(plan) as ready:
        return run_local(ready, inherited)


def _replace_launcher(plan: LaunchPlan, inherited: Mapping[str, str]) -> NoReturn:
    (process,) = plan.processes
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(process.argv[0], process.argv, plan.environment(process, inherited))


@contextmanager
def _with_port(plan: LaunchPlan) -> Iterator[LaunchPlan]:
    if not plan.hosts_rank_zero:
        yield plan
        return
    from accel_launch.port import hold_free_port, hold_port

    with hold_free_port() if plan.master_port is None else hold_port(plan.master_port) as port:
        yield plan.with_port(port)
