"""Train one unchanged script in every way to spread a model, and write its losses into the docs as a table.

    hatch run deepspeed:table            train all, and put the table into docs/pages/deepspeed.md
    hatch run deepspeed:table --check    train all, and compare with the table that is there; 1 where they differ

The script is docs/examples/train_digits.py: scikit-learn's digits, windows of four micro-batches of which the last in
an epoch is shorter, clipping, a schedule, evaluation with each image counted once. Only its `--spread` differs. The
global batch is the same, so the losses have to be, to rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from benchmarks import page
from repository import ROOT

__all__ = ["RUNS", "Curve", "Run", "differences", "differences_from_page", "main", "measure", "table"]

SCRIPT = ROOT / "docs" / "examples" / "train_digits.py"
PAGE = ROOT / "docs" / "pages" / "deepspeed.md"
MARKS = ("<!-- losses: begin -->", "<!-- losses: end -->")

LOSS_TOLERANCE = 1e-5
"""Largest difference of any step's loss from one process. Measured: 2.4e-7, the last bit of a float32 near 2.3."""
NORM_TOLERANCE = 1e-5
"""Largest relative difference of any step's norm before clipping. Measured: 4.3e-7 over 48 steps."""
PAGE_TOLERANCE = 1e-3
"""Largest difference of a loss from the one on the page, which another processor or torch rounded."""
IMAGES_TOLERANCE = 1
"""How many of the held-out images may be read otherwise, since two logits may nearly tie."""
EPOCHS = 4
LIMIT_S = 300
"""Longest that a run may take."""
_SHOWN = 5
"""Steps whose losses the table shows, evenly over the run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row."""

    title: str
    spread: str
    """What the script is told."""
    num_processes: int
    needs_deepspeed: bool = False


RUNS: Mapping[str, Run] = {
    "one": Run(title="one process", spread="default", num_processes=1),
    "ddp": Run(title="DDP", spread="default", num_processes=2),
    "fsdp": Run(title="FSDP2", spread="fsdp", num_processes=2),
    **{
        f"zero{stage}": Run(
            title=f"DeepSpeed, ZeRO-{stage}", spread=f"zero{stage}", num_processes=2, needs_deepspeed=True
        )
        for stage in range(4)
    },
}
"""By name; the first is what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a run gave."""

    losses: tuple[float, ...]
    """Mean over all images of a window, at each step."""
    norms: tuple[float, ...]
    """Of the gradients before clipping, at each step."""
    rates: tuple[float, ...]
    """Of learning, after each step."""
    correct: int
    """Held-out images that were read right in the end."""
    evaluated: int
    """Held-out images."""

    def shown(self) -> list[int]:
        """Numbers of the steps that the table shows, from 1: the first, the last, and some between."""
        last = len(self.losses)
        return sorted({max(1, round(last * part / (_SHOWN - 1))) for part in range(_SHOWN)})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.check and options.epochs != EPOCHS:
        parser.error(f"--check compares with a table of {EPOCHS} epochs: leave --epochs {options.epochs} out")
    missing = [name for name in options.only if RUNS[name].needs_deepspeed and not _has_deepspeed()]
    if missing:
        print(f"{', '.join(missing)}: DeepSpeed is not installed for {sys.executable}.", file=sys.stderr)
        print("Run `hatch run deepspeed:table`, or leave them out with `--only one ddp fsdp`.", file=sys.stderr)
        return 2
    names = list(dict.fromkeys(["one", *options.only]))
    curves = {}
    for name in names:
        print(f"training: {RUNS[name].title}", file=sys.stderr, flush=True)
        curves[name] = measure(RUNS[name], epochs=options.epochs)
    text = table(curves)
    print(text)
    found = [f"{RUNS[name].title}: {each}" for name in names for each in differences(curves["one"], curves[name])]
    if options.check:
        found += differences_from_page(text, options.page.read_text(encoding="utf-8"))
    for line in found:
        print(line, file=sys.stderr)
    if found:
        return 1
    if options.check:
        print(f"as {options.page.name} says", file=sys.stderr)
    elif len(names) == len(RUNS) and options.epochs == EPOCHS:
        page.write(text, options.page, marks=MARKS)
    else:
        print(f"not written: the table of {options.page.name} has all runs, of {EPOCHS} epochs", file=sys.stderr)
    return 0


def measure(run: Run, *, epochs: int = EPOCHS) -> Curve:
    """Train once.

    Raises:
        RuntimeError: with the end of what the run said, where it failed.
    """
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-cpu-threads-per-process", "1"),
                *("--num-processes", str(run.num_processes), SCRIPT),
                *("--spread", run.spread, "--project-dir", folder, "--epochs", str(epochs)),
            ],
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(f"{run.title} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}")
        (metrics,) = Path(folder).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    result = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    if [row["step"] for row in rows] != list(range(1, result["steps"] + 1)):
        raise RuntimeError(f"{run.title} logged {len(rows)} steps of {result['steps']}.")
    return Curve(
        losses=tuple(row["loss"] for row in rows),
        norms=tuple(row["norm"] for row in rows),
        rates=tuple(row["lr"] for row in rows),
        correct=result["correct"],
        evaluated=result["evaluated"],
    )


def differences(reference: Curve, curve: Curve) -> list[str]:
    """What is not the same, to the stated tolerances; empty where all is."""
    if len(curve.losses) != len(reference.losses) or curve.evaluated != reference.evaluated:
        took, evaluated = len(reference.losses), reference.evaluated
        return [f"{len(curve.losses)} steps and {curve.evaluated} images, and one process had {took} and {evaluated}"]
    found = []
    if not (worst := _loss_difference(reference, curve)) <= LOSS_TOLERANCE:
        found.append(f"losses differ by up to {worst:.2g}, and {LOSS_TOLERANCE:g} is allowed")
    if not (worst := _norm_difference(reference, curve)) <= NORM_TOLERANCE:
        found.append(f"norms differ by up to {worst:.2g} of themselves, and {NORM_TOLERANCE:g} is allowed")
    if curve.rates != reference.rates:
        step = next(i for i, pair in enumerate(zip(curve.rates, reference.rates, strict=True), 1) if len(set(pair)) > 1)
        found.append(f"learning rates differ from step {step} on")
    if abs(curve.correct - reference.correct) > IMAGES_TOLERANCE:
        found.append(f"{curve.correct} images were read right, and {reference.correct} by one process")
    return found


def differences_from_page(text: str, written: str) -> list[str]:
    """Where a table differs from the one on the page; empty where it does not.

    Losses may differ by `PAGE_TOLERANCE`, counts of images by twice `IMAGES_TOLERANCE`; the columns of differences,
    which have a tolerance of their own, are not compared.
    """
    ours, theirs = _rows(text), _rows(_between(written))
    if not theirs:
        return [f"the page has no table between {MARKS[0]} and {MARKS[1]}: run this without --check"]
    found = []
    for title, cells in ours.items():
        if title not in theirs or len(theirs[title]) != len(cells):
            found.append(f"{title}: the page has no such row of as many columns")
            continue
        *losses, correct, _, _ = cells
        *their_losses, their_correct, _, _ = theirs[title]
        for mine, other in zip(losses, their_losses, strict=True):
            if not abs(float(mine) - float(other)) <= PAGE_TOLERANCE:
                found.append(f"{title}: a loss is {mine}, and {other} on the page; {PAGE_TOLERANCE:g} is allowed")
        if abs(int(correct) - int(their_correct)) > 2 * IMAGES_TOLERANCE:
            found.append(f"{title}: {correct} images were read right, and {their_correct} on the page")
    return found


def table(curves: Mapping[str, Curve]) -> str:
    """One row a run, in Markdown, below what it was made with."""
    one = curves["one"]
    steps = one.shown()
    heads = [
        "run", "processes", *(f"loss, step {step}" for step in steps), f"right of {one.evaluated}",
        "largest difference of a loss", "of a norm, relative",
    ]  # fmt: skip
    made = (
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.system()}, Python {platform.python_version()}, "
        f"{', '.join(_versions())}, float32 on the CPU over gloo; differences are from one process, over all "
        f"{len(one.losses)} steps."
    )
    lines = [
        made,
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for name, curve in curves.items():
        cells = [RUNS[name].title, str(RUNS[name].num_processes), *(f"{curve.losses[step - 1]:.6f}" for step in steps)]
        cells += [str(curve.correct), *_shown_differences(one, curve)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown_differences(one: Curve, curve: Curve) -> tuple[str, str]:
    if curve is one:
        return "-", "-"
    return f"{_loss_difference(one, curve):.1e}", f"{_norm_difference(one, curve):.1e}"


def _loss_difference(reference: Curve, curve: Curve) -> float:
    return _largest(abs(a - b) for a, b in zip(reference.losses, curve.losses, strict=True))


def _norm_difference(reference: Curve, curve: Curve) -> float:
    return _largest(abs(a - b) / a for a, b in zip(reference.norms, curve.norms, strict=True))


def _largest(values: Iterable[float]) -> float:
    """Where one is not a number, as after a run that diverged, that one is the largest."""
    return max(math.inf if math.isnan(value) else value for value in values)


def _between(text: str) -> str:
    return text.partition(MARKS[0])[2].partition(MARKS[1])[0]


def _rows(text: str) -> dict[str, list[str]]:
    """Cells of the rows that hold numbers, by the title of the run and its number of processes."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return {f"{title} on {count}": cells for title, count, *cells in rows if count.isdigit()}


def _versions() -> list[str]:
    packages = {"torch": "torch", "DeepSpeed": "deepspeed"} if _has_deepspeed() else {"torch": "torch"}
    return [f"{name} {version(package)}" for name, package in packages.items()]


def _has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            [
                "runs",
                *(f"  {name:8}{run.title}, {run.num_processes} process(es)" for name, run in RUNS.items()),
                "",
                "A run is as one process if, at every step, its loss differs by at most",
                f"{LOSS_TOLERANCE:g}, its norm by {NORM_TOLERANCE:g} of itself and its learning rate not at all,",
                f"and at most {IMAGES_TOLERANCE} of the held-out images is read otherwise.",
                "",
                "exit codes",
                "  1  something differs; nothing was written",
                "  2  DeepSpeed is not installed, or a command line that cannot work",
            ]
        ),
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"write nothing; compare with the table on the page too, whose losses may differ by {PAGE_TOLERANCE:g}",
    )
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN",
        help="train these alone, and one process, and write nothing",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help=f"passes over the images (default {EPOCHS}, as on the page)"
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help=f"page with the table (default {PAGE.name} of the site)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
