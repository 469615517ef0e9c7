"""Measure accel beside plain torch and beside its peers, and print a table.

    python tools/benchmarks/run.py [--peer-python PYTHON] [--only P7 P9] [--rounds N] [--repeats N] [--write [PAGE]]

Every implementation runs in processes of its own, the peers in an environment of theirs, which only `--peer-python`
names. The sides take turns; medians over the turns are shown. Nothing here decides a test.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import checkpoint as saving
from benchmarks import compile as compilation
from benchmarks import (
    ddp,
    deepspeed,
    device_map,
    dispatch,
    fsdp,
    gather,
    importing,
    launch,
    loader,
    loading,
    offload,
    page,
    resume,
    step,
)
from benchmarks.compare import Comparison, Outcome
from benchmarks.compare import run as run_comparison
from benchmarks.sides import Side, inspect_sides

__all__ = ["main"]

MEASUREMENTS = (
    step, ddp, fsdp, deepspeed, gather, loader, dispatch, resume, saving, launch, importing, compilation, device_map,
    loading, offload,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(argv)
    sides = inspect_sides(peer_python=options.peer_python)
    outcomes = []
    for comparison in _chosen(sides, options.only):
        outcomes.append(
            run_comparison(comparison, rounds=options.rounds, repeats=options.repeats, warm_up=options.warm_up)
        )
        _progress(outcomes[-1])
    if options.json:
        print(json.dumps([_as_json(outcome) for outcome in outcomes], indent=1))
        return 0
    text = page.report(outcomes, sides, rounds=options.rounds, repeats=options.repeats)
    print(text)
    if options.write:
        page.write(text, options.write)
    return 0


def _chosen(sides: dict[str, Side], keys: Sequence[str] | None) -> list[Comparison]:
    every = [comparison for module in MEASUREMENTS for comparison in module.comparisons(sides)]
    return [comparison for comparison in every if not keys or comparison.key in keys]


def _progress(outcome: Outcome) -> None:
    print(f"{outcome.comparison.key} {outcome.comparison.title}: {outcome.against['accel']:.3g}", file=sys.stderr)
    for name, said in outcome.failures.items():
        print(f"  {name} could not be measured: {said}", file=sys.stderr)


def _as_json(outcome: Outcome) -> dict[str, object]:
    comparison = outcome.comparison
    return {
        "key": comparison.key,
        "title": comparison.title,
        "by": comparison.by,
        "goal": comparison.goal,
        "times_s": outcome.times,
        "against": outcome.against,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter that the peers are installed for")
    parser.add_argument("--only", nargs="+", metavar="KEY", help="measure these alone, such as P7 P9")
    parser.add_argument("--rounds", type=int, default=5, help="times that processes are started anew (default 5)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side in a round (default 7)")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="count the first turn too")
    parser.add_argument("--json", action="store_true", help="print JSON, all times in seconds, instead of a table")
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=page.PAGE,
        metavar="PAGE",
        help=f"put the table into this page, between its marks (default {page.PAGE.name} of the site)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
