"""One unchanged script gives the losses of one process, however it is spread; the benchmark of DeepSpeed runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import losses
from benchmarks import deepspeed
from benchmarks.sides import inspect_sides

EPOCHS = 2
"""Half of the table on the page: 24 steps, of which the last 15 are clipped."""


@pytest.fixture(scope="module")
def one() -> losses.Curve:
    return losses.measure(losses.RUNS["one"], epochs=EPOCHS)


def test_one_process_learns_and_clips_in_windows_of_which_the_last_is_shorter(one: losses.Curve) -> None:
    assert len(one.losses) == EPOCHS * math.ceil(1437 / (4 * 32))
    assert one.losses[-1] < 0.5 < 2 < one.losses[0]
    assert sum(norm > 0.5 for norm in one.norms) >= 10
    assert one.evaluated == 359


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", [name for name in losses.RUNS if name != "one"])
def test_losses_are_those_of_one_process(name: str, one: losses.Curve) -> None:
    """Within 1e-5 at every step, norms within 1e-5 of themselves; measured were 2.4e-7 and 4.3e-7."""
    curve = losses.measure(losses.RUNS[name], epochs=EPOCHS)
    assert losses.differences(one, curve) == []


@pytest.mark.timeout(200)
@pytest.mark.parametrize("side", ["torch", "accel"])
def test_the_benchmark_gives_a_number(side: str) -> None:
    comparison = deepspeed.comparisons(inspect_sides(peer_python=None))[3]
    assert comparison.title == "one ZeRO-2 step on two gloo processes, a window of 4, clipped"
    with comparison.samplers[side]() as sample:
        assert 0 < sample() < math.inf
