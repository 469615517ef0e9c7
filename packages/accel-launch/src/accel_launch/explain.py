"""A launch plan as text: what `accel launch --dry-run` prints."""

from __future__ import annotations

import shlex

from accel_launch.plan import LaunchPlan

__all__ = ["explain_plan"]


def explain_plan(plan: LaunchPlan) -> str:
    """Every setting with its value and source, then every command and what it finds changed in its environment."""
    machines = f" on machine {plan.machine_rank} of {plan.num_machines}" if plan.num_machines > 1 else ""
    here = len(plan.processes)
    sections = [
        f"{here} of {plan.world_size} process(es) would start{machines}; nothing was started.",
        "settings of the launch\n" + _settings(plan),
        "settings of the run (arguments of Accelerator(...) in the script win over them)\n"
        + _indent(plan.run_config.explain()),
        "environment of every process, beside what is inherited\n" + _shared(plan),
    ]
    for process in plan.processes:
        own = " ".join(f"{name}={value}" for name, value in process.env.items() if name not in _shared_names(plan))
        sections.append(f"rank {process.rank}\n  {shlex.join(process.argv)}" + (f"\n  + {own}" if own else ""))
    return "\n\n".join(sections)


def _settings(plan: LaunchPlan) -> str:
    rows = [(each.name, repr(each.value), each.source) for each in plan.settings]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def _shared_names(plan: LaunchPlan) -> list[str]:
    if plan.world_size == 1:
        return list(plan.processes[0].env)
    return [name for name in plan.processes[0].env if name not in ("RANK", "LOCAL_RANK")]


def _shared(plan: LaunchPlan) -> str:
    env = plan.processes[0].env
    lines = [f"  + {name}={env[name]}" for name in _shared_names(plan)]
    if plan.needs_port:
        lines.append("  + MASTER_PORT=<a free port>")
    lines += [f"  - {name}" for name in sorted(plan.removed - set(env))]
    return "\n".join(lines) or "  (no difference)"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
