"""What the soak judges, how it draws its kills, and what it does to a run; the real thing is in integration-tests."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import soak
import soak_kills
from soak_kills import KINDS, Kill, SoakError, Start, plan_kills, unfinished
from soak_verdict import parse, problems

STEPS = 6


def step(number: int, loss: float | None = None) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1 / number if loss is None else loss}


def resumed(at: int) -> dict[str, Any]:
    return {"event": "resumed", "step": at}


def ended(weights: str = "abc") -> dict[str, Any]:
    return {"event": "ended", "step": STEPS, "weights": weights}


ALONE = [resumed(0), *map(step, range(1, STEPS + 1)), ended()]
FIRST = [resumed(0), step(1), step(2), {"event": "saved", "step": 2}, step(3)]
LAST = [resumed(2), *map(step, range(3, STEPS + 1)), ended()]


def judge(*rounds: list[dict[str, Any]], alone: list[dict[str, Any]] = ALONE) -> list[str]:
    return problems(alone, rounds, last_step=STEPS)


def test_a_run_that_repeats_steps_alike_is_the_same_run() -> None:
    assert judge(FIRST, [], [resumed(2)], LAST) == []


@pytest.mark.parametrize("loss", [math.nextafter(1 / 3, 1), math.nan, -1 / 3])
def test_one_loss_of_a_step_that_is_repeated_later_differs_by_a_bit(loss: float) -> None:
    (said,) = judge([*FIRST[:-1], step(3, loss)], LAST)
    assert said == f"start 1, which resumed at step 0: the loss of step 3 is {loss!r} and not {1 / 3!r}"


def test_zeros_of_different_signs_differ() -> None:
    zero = [step(3, 0.0) if each == step(3) else each for each in ALONE]
    assert judge([*FIRST[:-1], step(3, -0.0)], [resumed(2), *zero[3:]], alone=zero) == [
        "start 1, which resumed at step 0: the loss of step 3 is -0.0 and not 0.0"
    ]


def test_losses_that_are_no_number_in_both_are_equal() -> None:
    broken = [step(3, math.nan) if each == step(3) else each for each in ALONE]
    assert judge([*FIRST[:-1], step(3, math.nan)], [resumed(2), *broken[3:]], alone=broken) == []


def test_many_differences_are_counted() -> None:
    wrong = [[resumed(0), *(step(number, 9.0) for number in range(1, STEPS + 1))]] * 2
    *shown, more = judge(*wrong, LAST)
    assert len(shown) == 5
    assert more == "7 of 16 losses more differ"


def test_a_complete_checkpoint_that_was_lost() -> None:
    again = [resumed(0), *map(step, range(1, STEPS + 1)), ended()]
    assert judge(FIRST, LAST[:2], again) == ["start 3 resumed at step 0, although step 2 was saved before it"]


def test_steps_that_were_left_out() -> None:
    missing, other = judge(FIRST, [resumed(2), step(3), step(5), step(6), ended()])
    assert missing == "the run that was killed lacks 1 of 6 steps, such as step 4"
    assert other == "start 2 resumed at step 2 and took other steps than the next ones"


def test_other_weights_and_an_end_that_never_came() -> None:
    assert judge(FIRST, [*LAST[:-1], ended("def")]) == ["the final weights are def and not abc"]
    assert judge(FIRST, LAST[:-1]) == ["the final weights are None and not abc"]


def test_nothing_is_shown_where_nothing_was_resumed() -> None:
    assert judge(ALONE) == ["no start went on from a checkpoint, so nothing was shown: leave more time before a kill"]


def test_a_line_that_was_cut_is_no_event() -> None:
    assert parse('{"event": "step", "step": 1, "loss": 0.5}\n{"event": "st') == [step(1, 0.5)]


def test_kills_are_drawn_from_the_seed_and_each_kind_equally_often() -> None:
    kills = plan_kills(200, seed=3, within_s=2.0)
    assert kills == plan_kills(200, seed=3, within_s=2.0)
    assert kills != plan_kills(200, seed=4, within_s=2.0)
    assert set(Counter(kill.kind.name for kill in kills).values()) == {33, 34}
    assert all(0 <= kill.after_s <= 2.0 and 0 <= kill.worker < 1 for kill in kills)
    assert {int(kill.worker * 2) for kill in kills} == {0, 1}


def test_the_times_of_kills_do_not_lie_together() -> None:
    times = sorted(kill.after_s for kill in plan_kills(200, seed=0, within_s=2.0))
    assert times[0] < 0.1
    assert times[-1] > 1.9
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 0.1


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
with open(sys.argv[1], "w") as journal:
    journal.write('{"event": "begun", "pid": %d}\\n' % child.pid)
time.sleep(60)
"""


@pytest.fixture
def kind_of_kill() -> dict[str, Kill]:
    return {kind.name: Kill(kind=kind, after_s=0.0, into_save_s=0.0, worker=0.0) for kind in KINDS}


def start(folder: Path, text: str = PARENT) -> Start:
    journal = folder / "journal.jsonl"
    return Start([sys.executable, "-c", text, str(journal)], journal=journal, log=folder / "log")


def test_what_outlives_its_launcher_is_found_and_ended(
    tmp_path: Path, kind_of_kill: dict[str, Kill], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_kills, "GONE_WITHIN_S", 0.2)
    with start(tmp_path) as run:
        workers = run.wait_until_begun(1)
        assert set(workers) < set(run.alive())
        run.kill(kind_of_kill["launcher"], workers, checkpoints=tmp_path)
        with pytest.raises(SoakError, match=rf"1 process\(es\) were alive 0.2 s later: {workers[0]} .*sleep"):
            run.wait_until_gone()
        assert run.alive() == workers
    assert run.alive() == []


def test_everything_is_killed_when_a_checkpoint_appears(tmp_path: Path, kind_of_kill: dict[str, Kill]) -> None:
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".left by another").mkdir(parents=True)
    (checkpoints / "checkpoint_3").mkdir()
    assert list(unfinished(checkpoints)) == [".left by another"]
    text = PARENT.replace("time.sleep(60)\n", f"os.mkdir({str(checkpoints / '.new')!r})\ntime.sleep(60)\n")
    with start(tmp_path, text.replace("os.mkdir", "time.sleep(0.3); os.mkdir")) as run:
        workers = run.wait_until_begun(1)
        assert list(unfinished(checkpoints)) == [".left by another"]
        run.kill(kind_of_kill["everything-in-save"], workers, checkpoints=checkpoints)
        assert sorted(unfinished(checkpoints)) == [".left by another", ".new"]
        assert run.wait_until_gone() < 5


def test_a_run_that_ends_before_its_kill(tmp_path: Path) -> None:
    with (
        start(tmp_path, "raise SystemExit('no such checkpoint')") as run,
        pytest.raises(SoakError, match=r"(?s)it ended by itself, with exit code 1.*no such checkpoint"),
    ):
        run.wait_until_begun(1)


def test_a_launcher_that_says_all_is_well_after_a_kill(tmp_path: Path, kind_of_kill: dict[str, Kill]) -> None:
    text = "import signal; signal.signal(15, lambda *_: exit(0));" + PARENT.replace("time.sleep(60)\n", "")
    text = text.replace("start_new_session=True)", ")") + "child.wait()\n"
    with start(tmp_path, text) as run:
        workers = run.wait_until_begun(1)
        os.kill(workers[0], 9)
        with pytest.raises(SoakError, match="the launcher said by its exit code that all is well"):
            run.wait_until_gone()


@pytest.mark.parametrize("words", [["--kills", "0"], ["--within-s", "0"], ["--save-every", "0"], ["--folder", "."]])
def test_a_command_line_that_cannot_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        soak.main(words)
    assert words[0] in capsys.readouterr().err
