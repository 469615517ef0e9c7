"""Ways to kill a run of several processes, and one start of such a run that can be killed so."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from soak_verdict import Event, parse, steps_of

__all__ = ["KINDS", "Kill", "Kind", "SoakError", "Start", "WHOLE_RUN_S", "plan_kills", "unfinished"]

VARIABLE = "ACCEL_SOAK_RUN"
"""Marks whatever a start of a run has started; it is inherited."""
BEGIN_WITHIN_S = 90
"""How long a start may take to reach its training."""
SAVE_WITHIN_S = 20
"""How long a save is waited for."""
GONE_WITHIN_S = 10
"""How long after a kill the last process may live. The launcher promises 2 s, on a machine that is not too busy."""
WHOLE_RUN_S = 3600
"""How long a run may take to its last step."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to be killed."""

    name: str
    what: str
    victim: Literal["everything", "launcher", "worker"]
    number: signal.Signals = signal.SIGKILL
    in_save: bool = False
    """Whether it waits until a checkpoint is being written."""


KINDS = (
    Kind(name="everything", what="SIGKILL to all processes of the run at once", victim="everything"),
    Kind(name="worker", what="SIGKILL to one worker", victim="worker"),
    Kind(name="launcher", what="SIGKILL to the launcher, which cannot end its workers then", victim="launcher"),
    Kind(name="terminate", what="SIGTERM to the launcher", victim="launcher", number=signal.SIGTERM),
    Kind(name="everything-in-save", what="as above, while a checkpoint is written", victim="everything", in_save=True),
    Kind(name="worker-in-save", what="as above, while a checkpoint is written", victim="worker", in_save=True),
)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What is done to one start of the run."""

    kind: Kind
    after_s: float
    """Since all workers are about to load their checkpoint."""
    into_save_s: float
    """Since the writing of a checkpoint was seen; ignored unless the kind waits for that."""
    worker: float
    """From 0 to 1: which worker, where one is meant."""


def plan_kills(num: int, *, seed: int, within_s: float) -> list[Kill]:
    """The kills of a soak: each kind equally often, in random order, at random times. Pure."""
    draw = random.Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(num)]
    draw.shuffle(kinds)
    return [
        # A small checkpoint is written in some milliseconds: half of the kills come within the first four.
        Kill(kind=kind, after_s=draw.uniform(0, within_s), into_save_s=0.03 * draw.random() ** 3, worker=draw.random())
        for kind in kinds
    ]


class SoakError(Exception):
    """The soak cannot go on: a run did what it must not."""


class Start:
    """One start of the training; nothing of it is left when the block ends."""

    def __init__(self, words: Sequence[str], *, journal: Path, log: Path) -> None:
        self.journal = journal
        self._log = log
        self._mark = f"{VARIABLE}={os.getpid()}-{journal}"
        name, _, value = self._mark.partition("=")
        with log.open("wb") as output:
            # In this process group: whoever kills that, kills the launcher, which ends its workers.
            self._launcher = subprocess.Popen(
                words, env={**os.environ, name: value}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._launcher.wait()

    def events(self) -> list[Event]:
        """All that it has written."""
        return parse(self.journal.read_text(encoding="utf-8")) if self.journal.exists() else []

    def alive(self) -> list[int]:
        """Processes that bear its mark, the launcher and what outlives it included."""
        mark, found = self._mark.encode(), []
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(int(name))
        return found

    def wait_until_begun(self, num_processes: int) -> list[int]:
        """The workers, once all are about to load their checkpoint."""
        deadline = time.monotonic() + BEGIN_WITHIN_S
        while True:
            pids = [event["pid"] for event in self.events() if event["event"] == "begun"]
            if len(pids) == num_processes:
                return pids
            self.require_running()
            if time.monotonic() > deadline:
                raise SoakError(f"it had not begun after {BEGIN_WITHIN_S} s\n{self.said()}")
            time.sleep(0.01)

    def require_running(self) -> None:
        """Raise where it has ended by itself."""
        if (code := self._launcher.poll()) is not None:
            raise SoakError(f"it ended by itself, with exit code {code}\n{self.said()}")

    def kill(self, kill: Kill, workers: Sequence[int], *, checkpoints: Path) -> None:
        """Do it, for some kinds as soon as a checkpoint is being written."""
        victims = {
            "everything": self.alive(),  # found before: looking takes as long as a save
            "launcher": [self._launcher.pid],
            "worker": [workers[int(kill.worker * len(workers))]],
        }[kill.kind.victim]
        if kill.kind.in_save:
            self._wait_for_a_save(checkpoints)
            time.sleep(kill.into_save_s)
        self.require_running()
        for pid in victims:
            _send(pid, kill.kind.number)
        if kill.kind.victim == "everything":
            self._end()  # what has been started since

    def _wait_for_a_save(self, checkpoints: Path) -> None:
        known = unfinished(checkpoints)  # what earlier kills have left, too
        deadline = time.monotonic() + SAVE_WITHIN_S
        while not unfinished(checkpoints).items() - known.items():
            self.require_running()
            if time.monotonic() > deadline:
                raise SoakError(f"no unfinished checkpoint was seen within {SAVE_WITHIN_S} s\n{self.said()}")
            time.sleep(0.0005)

    def _end(self) -> None:
        while left := self.alive():
            for pid in left:
                _send(pid, signal.SIGKILL)

    def wait_until_gone(self) -> float:
        """Seconds until nothing of it is alive."""
        begin = time.monotonic()
        while True:
            code = self._launcher.poll()  # reaps it
            left = self.alive()
            seconds = time.monotonic() - begin
            if not left and code is not None:
                break
            if seconds > GONE_WITHIN_S:
                raise SoakError(f"{len(left)} process(es) were alive {GONE_WITHIN_S} s later: {_command_lines(left)}")
            time.sleep(0.005)
        if code == 0:
            raise SoakError(f"it was killed, and the launcher said by its exit code that all is well\n{self.said()}")
        return seconds

    def wait_to_the_end(self, last_step: int) -> None:
        """Show how far it is until it has ended, which it must without an error."""
        deadline = time.monotonic() + WHOLE_RUN_S
        with tqdm(total=last_step, desc=self.journal.stem, unit="step", disable=None) as bar:
            while (code := self._launcher.poll()) is None and time.monotonic() < deadline:
                time.sleep(0.3)
                bar.update(max(steps_of(self.events()), default=0) - bar.n)
            bar.update(last_step - bar.n)
        if code != 0:
            raise SoakError(f"{self.journal.stem} ended with exit code {code}\n{self.said()}")
        begin = time.monotonic()
        while left := self.alive():
            if time.monotonic() > begin + GONE_WITHIN_S:
                raise SoakError(f"{self.journal.stem} ended and left processes behind: {_command_lines(left)}")
            time.sleep(0.005)

    def said(self) -> str:
        """The end of its output."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]


def unfinished(folder: Path) -> dict[str, int]:
    """Unfinished checkpoints by name, with the time of their last change. Any may vanish while it is looked at."""
    found = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                with suppress(FileNotFoundError):
                    found[entry.name] = entry.stat(follow_symlinks=False).st_mtime_ns
    return found


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _command_lines(pids: Sequence[int]) -> str:
    found = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(f"{pid} {Path('/proc', str(pid), 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
    return "; ".join(found)
