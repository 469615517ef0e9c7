"""Every measurement runs and gives numbers. What the numbers are is no matter here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, page
from benchmarks.sides import Side
from repository import ROOT

KEYS = ["P3", "P4", "P5", "P6", "P7", "P8", "P9", "P10", "P11", "P12", "P13", "P14", "P15", "Dispatch"]


@pytest.mark.matrix
@pytest.mark.parametrize("key", KEYS)
def test_a_measurement_of_accel_alone_gives_a_finite_positive_number(key: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "tools/benchmarks/run.py",
            "--only",
            key,
            "--rounds",
            "1",
            "--repeats",
            "1",
            "--no-warm-up",
            "--json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes
    for outcome in outcomes:
        assert outcome["key"] == key
        assert set(outcome["times_s"]) <= {"torch", "reference", "beginning", "accel"}
        for seconds in outcome["times_s"].values():
            assert math.isfinite(seconds)
            assert seconds > 0


def outcome(times: dict[str, float], *, by: str, goal: float, missing: str | None = None) -> compare.Outcome:
    """What a comparison with constant samplers gives."""

    def fixed(seconds: float) -> compare.Sampler:
        return lambda: seconds

    class Constant:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> compare.Sampler:
            if self.name == missing:
                raise RuntimeError("is not there")
            return fixed(times[self.name])

        def __exit__(self, *raised: object) -> None:
            pass

    return compare.run(
        compare.Comparison(
            key="P0",
            title="constants",
            reference="torch",
            by=by,  # type: ignore[arg-type]
            goal=goal,
            samplers={name: lambda name=name: Constant(name) for name in times},  # type: ignore[misc]
        ),
        rounds=2,
        repeats=3,
    )


@pytest.mark.parametrize(
    ("by", "expected", "goal", "met"),
    [("added", 0.5, 0.5, True), ("added", 0.5, 0.4, False), ("ratio", 1.5, 1.4, False), ("time", 1.5, 2.0, True)],
)
def test_accel_is_judged_by_what_the_comparison_says(by: str, expected: float, goal: float, met: bool) -> None:
    found = outcome({"torch": 1.0, "accel": 1.5}, by=by, goal=goal)
    assert found.against["accel"] == pytest.approx(expected)
    assert found.spread == pytest.approx((expected, expected))
    assert found.meets_goal is met


def test_a_peer_that_fails_is_shown_as_failed_and_the_others_are_measured() -> None:
    found = outcome({"torch": 1.0, "accel": 1.5, "accelerate": 2.0}, by="ratio", goal=2.0, missing="accelerate")
    assert found.failures == {"accelerate": "is not there"}
    ours = Side("accel", sys.executable, {"accel": "0", "torch": "0"}, "")
    row = page.report([found], {"accel": ours}, rounds=2, repeats=3).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[3:7]] == ["1.00 s", "1.50 s", "failed", "not installed"]


def test_a_report_replaces_the_one_before_between_the_marks(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n")
    page.write("new", file)
    page.write("newer", file)
    assert file.read_text() == f"above\n{page.BEGIN}\n\nnewer\n\n{page.END}\nbelow\n"


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("nothing to write between")
    with pytest.raises(ValueError, match="Put them where the table belongs"):
        page.write("new", file)
    assert file.read_text() == "nothing to write between"


def test_peers_have_no_columns_where_there_are_none() -> None:
    sides = {name: Side(name, sys.executable, {name: "0"}, "") for name in ("torch", "accel")}
    lines = page.report([outcome({"torch": 1.0, "accel": 1.5}, by="ratio", goal=2.0)], sides, rounds=2, repeats=3)
    head, _, row = lines.splitlines()[-3:]
    assert "accelerate" not in head
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["1.00 s", "1.50 s", "1.50 x (1.50 x to 1.50 x)"]
