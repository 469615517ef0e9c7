"""The launcher's own words at the end of a launch that did not end well."""

from __future__ import annotations

import signal

from accel_launch.plan import LaunchPlan, ProcessPlan

__all__ = ["describe_failure", "describe_interruption"]

_HINTS = {
    signal.SIGKILL: "the machine may be out of memory; `dmesg` tells",
    signal.SIGSEGV: "an invalid memory access in native code; `python -X faulthandler` shows where",
    signal.SIGABRT: "native code gave up; its reason is above",
}


def describe_failure(plan: LaunchPlan, process: ProcessPlan, exit_code: int, num_stopped: int) -> str:
    """Which rank failed first, how, and what became of the others. Pure.

    Args:
        plan: the launch.
        process: the process that failed first.
        exit_code: negative where a signal ended it.
        num_stopped: processes of this machine that were ended because of it.
    """
    if exit_code < 0:
        number = signal.Signals(-exit_code)
        hint = f" ({_HINTS[number]})" if number in _HINTS else ""
        end = f"was killed by {number.name}{hint}"
    else:
        end = f"failed with exit code {exit_code}"
    here = f" on machine {plan.machine_rank}" if plan.num_machines > 1 else ""
    others = ""
    if num_stopped:
        others = f" {num_stopped} other process(es){here or ' of this launch'} were stopped."
    rank = f"rank {process.rank} of {plan.world_size}{here}"
    return f"accel launch: {rank} {end}, running {plan.script}.{others}{_logs(plan)}\n"


def describe_interruption(plan: LaunchPlan, number: signal.Signals, num_stopped: int) -> str:
    """That a signal ended the launch, not a failure. Pure."""
    cause = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    return f"accel launch: {cause}; {num_stopped} process(es) running {plan.script} were stopped.\n"


def _logs(plan: LaunchPlan) -> str:
    if plan.log_dir is not None:
        return f" What every rank wrote is in {plan.log_dir}."
    if len(plan.processes) > 1:
        return " Tracebacks of other ranks are not shown; `--log-dir DIR` keeps them."
    return ""
