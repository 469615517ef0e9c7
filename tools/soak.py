"""Kill a training run again and again, resume it each time, and require that nobody can tell.

    hatch run soak                       200 kills: about a quarter of an hour on two idle cores
    hatch run soak --kills 12 --seed 7   a short one; the seed decides what is killed, and when
    hatch run soak --spoil weight        see it fail: a weight is off by a thousandth after each resume

The run is tools/soak_run.py on two processes, started by `accel launch`. It saves every few steps and has no last step
until the kills are through: so none comes too late, however fast the machine is. Then it is resumed once more, to some
steps beyond the furthest one. After that a second run goes there undisturbed, without saving anything, and

- every loss of the first run, those of repeated steps included, equals the second's bit by bit, and so do the weights;
- no start went on before a checkpoint that had been reported complete;
- nothing that a run had started was still alive ten seconds after its kill;
- nothing unfinished lies beside the checkpoints in the end, and no more checkpoints than were to be kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from repository import ROOT
from soak_kills import KINDS, WHOLE_RUN_S, Kill, SoakError, Start, plan_kills, unfinished
from soak_verdict import Event, problems, steps_of

__all__ = ["main"]

SCRIPT = ROOT / "tools" / "soak_run.py"
STEPS_BEYOND = 30
"""Steps after the furthest one of a killed run, so that the last start trains too."""


@dataclass(kw_only=True)
class Tally:
    """What happened so far."""

    rounds: list[list[Event]] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    unfinished: Counter[str] = field(default_factory=Counter)
    """Kills that left an unfinished checkpoint behind, by kind."""
    slowest_end_s: float = 0.0

    @property
    def furthest(self) -> int:
        return max((step for events in self.rounds for step in steps_of(events)), default=0)


class Soak:
    """The runs of one soak, in a folder of their own."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.tally = Tally()
        self._options = options
        self._project = folder / "killed"

    @property
    def checkpoints(self) -> Path:
        """Where the run that is killed saves."""
        return self._project / "checkpoints"

    def write_data(self) -> None:
        """Give the runs their images."""
        import numpy as np
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]

        digits = load_digits()
        images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
        np.savez(self.folder / "digits.npz", images=images, labels=labels)

    def kill_once(self, kill: Kill) -> None:
        """Start the run, or go on with it, and kill it."""
        number = len(self.tally.rounds) + 1
        known = unfinished(self.checkpoints)
        try:
            with self._start(f"start-{number:04d}", self._project) as run:
                workers = run.wait_until_begun(self._options.num_processes)
                time.sleep(kill.after_s)
                run.kill(kill, workers, checkpoints=self.checkpoints)
                seconds = run.wait_until_gone()
        except SoakError as error:
            raise SoakError(f"start {number}, {kill.kind.name} after {kill.after_s:.3f} s: {error}") from None
        self.tally.rounds.append(run.events())
        self.tally.killed[kill.kind.name] += 1
        self.tally.unfinished[kill.kind.name] += bool(unfinished(self.checkpoints).items() - known.items())
        self.tally.slowest_end_s = max(self.tally.slowest_end_s, seconds)

    def finish(self, last_step: int) -> list[str]:
        """Resume it to the end. Returns what is not as it has to be beside the losses."""
        with self._start("last start", self._project, last_step=last_step) as run:
            run.wait_to_the_end(last_step)
        self.tally.rounds.append(run.events())
        left = sorted(unfinished(self.checkpoints))
        found = [f"`{name}` was left unfinished beside the checkpoints" for name in left]
        kept = len(list(self.checkpoints.iterdir())) - len(left)
        # Besides those, the one that the last start went on from.
        if kept > self._options.total_limit + 1:
            found.append(f"{kept} checkpoints are left, and total_limit={self._options.total_limit}")
        return found

    def run_alone(self, last_step: int) -> list[Event]:
        """The same training undisturbed."""
        with self._start("undisturbed", self.folder / "undisturbed", last_step=last_step, save_every=0) as run:
            run.wait_to_the_end(last_step)
        return run.events()

    def _start(self, name: str, project: Path, *, last_step: int | None = None, save_every: int | None = None) -> Start:
        options, journal = self._options, self.folder / f"{name}.jsonl"
        words = [sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-cpu-threads-per-process", "1"]
        words += ["--num-processes", str(options.num_processes), str(SCRIPT), "--data", f"{self.folder}/digits.npz"]
        words += ["--project-dir", str(project), "--journal", str(journal), "--total-limit", str(options.total_limit)]
        words += ["--save-every", str(options.save_every if save_every is None else save_every)]
        if last_step is not None:
            words += ["--last-step", str(last_step), "--at-most-s", str(WHOLE_RUN_S)]
        if options.blocking_only:
            words.append("--blocking-only")
        if options.spoil is not None:
            words += ["--spoil", options.spoil]
        return Start(words, journal=journal, log=self.folder / f"{name}.log")


def summary(tally: Tally, alone: Sequence[Event], seconds: float) -> str:
    """What was done."""
    resumed = [event["step"] for events in tally.rounds for event in events if event["event"] == "resumed"]
    num_steps = sum(len(steps_of(events)) for events in tally.rounds)
    kills = sum(tally.killed.values())
    lines = [f"kills            {kills}, {seconds / max(kills, 1):.1f} s each"]
    for kind in KINDS:
        count, left = tally.killed[kind.name], tally.unfinished[kind.name]
        lines.append(f"  {kind.name:20}{count:4}, {left} of them with a checkpoint half written")
    from_the_beginning = resumed.count(0)
    lines += [
        f"resumed          {len(resumed) - from_the_beginning} times, and begun anew {from_the_beginning} times",
        f"steps            {tally.furthest}, and {num_steps - tally.furthest} taken again after a resume",
        f"slowest end      {tally.slowest_end_s:.1f} s after a kill",
    ]
    for name, events in (("killed run", tally.rounds[-1]), ("undisturbed run", alone)):
        ended = [event["weights"] for event in events if event["event"] == "ended"]
        lines.append(f"weights          {ended[0] if ended else '?'}  {name}")
    return "\n".join(lines)


def carry_out(soak: Soak, options: argparse.Namespace) -> list[str]:
    """All of it. Returns what is wrong; empty where nothing is."""
    soak.write_data()
    begin = time.monotonic()
    with tqdm(total=options.kills, desc="kills", unit="kill", disable=None) as bar:
        for kill in plan_kills(options.kills, seed=options.seed, within_s=options.within_s):
            soak.kill_once(kill)
            bar.set_postfix(steps=soak.tally.furthest, last=kill.kind.name, refresh=False)
            bar.update()
    seconds = time.monotonic() - begin
    last_step = soak.tally.furthest + STEPS_BEYOND
    found = soak.finish(last_step)
    alone = soak.run_alone(last_step)
    print(summary(soak.tally, alone, seconds))
    return found + problems(alone, soak.tally.rounds, last_step=last_step)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.kills < 1:
        parser.error(f"--kills {options.kills}: at least one is needed to show anything")
    if options.within_s <= 0:
        parser.error(f"--within-s {options.within_s:g}: nothing would have been trained before a kill")
    if options.save_every < 1:
        parser.error(f"--save-every {options.save_every}: nothing could be resumed without checkpoints")
    if options.folder is not None and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"--folder {options.folder}: it holds something, which runs would go on from; name a new one")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = carry_out(Soak(folder.resolve(), options), options)
    except SoakError as error:
        found = [str(error)]
    for line in found:
        print(f"WRONG: {line}")
    if found:
        print(f"verdict          failed (--seed {options.seed}); journals, output and checkpoints are in {folder}")
        return 1
    if options.folder is None:
        shutil.rmtree(folder)
    print("verdict          passed: every loss is equal to the undisturbed run's, bit by bit")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            [
                "kinds of kills, each equally often",
                *(f"  {kind.name:20}{kind.what}" for kind in KINDS),
                "",
                "exit codes",
                "  1  something is wrong; the folder is kept and named",
                "  2  a command line that cannot work",
            ]
        ),
    )
    parser.add_argument("--kills", type=int, default=200, help="how often it is killed (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when (default 0)")
    parser.add_argument(
        "--num-processes", type=int, default=2,
        help="of each run (default 2); the sum of three numbers depends on their order, which DDP may change after the "
        "first step of a process, so with more of them a loss may rightly differ in its last digits",
    )  # fmt: skip
    parser.add_argument(
        "--within-s", type=float, default=2.0, help="latest moment of a kill, from the start of training (default 2)"
    )
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints (default 5)")
    parser.add_argument("--total-limit", type=int, default=3, help="checkpoints that are kept (default 3)")
    parser.add_argument("--blocking-only", action="store_true", help="save in the foreground only, not by turns")
    parser.add_argument(
        "--spoil", choices=["generators", "custom", "weight"],
        help="leave this wrong after each resume, so that the soak has to fail",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, help="empty or new; everything is kept there (default: a temporary one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
