"""Lines of JSON: their format, resuming, crashes, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_state.errors import AccelError, ConfigError
from accel_state.protocols import Tracker
from accel_track import JsonlTracker, read_metrics


def _refuse_constants(text: str) -> float:
    raise AssertionError(f"{text} is not strict JSON")


def _strict(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=_refuse_constants) for line in text.split("\n")[:-1]]


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[JsonlTracker]:
    made = JsonlTracker(tmp_path)
    yield made
    made.finish()


def test_it_is_a_tracker(tracker: JsonlTracker) -> None:
    assert isinstance(tracker, Tracker)
    assert tracker.name == "jsonl"


def test_a_line_holds_step_time_and_values_and_is_there_at_once(tracker: JsonlTracker, tmp_path: Path) -> None:
    tracker.start("digits/seed-1", config={"lr": 0.1})
    before = time.time()
    tracker.log({"loss": 0.25, "lr": 1}, step=3)
    tracker.log({"note": "größe\u2028\ud800", "done": True, "nothing": None}, step=None)
    assert tracker.tracker == tmp_path / "digits" / "seed-1" / "metrics.jsonl"
    first, second = _strict(tracker.tracker)
    assert list(first) == ["step", "time", "loss", "lr"]
    assert (first["step"], first["loss"], first["lr"]) == (3, 0.25, 1)
    assert before - 1 < first["time"] < time.time() + 1
    assert second["step"] is None
    assert second["note"] == "größe\u2028\ud800"
    assert second["done"] is True
    assert json.loads((tmp_path / "digits" / "seed-1" / "config.json").read_text()) == {"lr": 0.1}


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tracker: JsonlTracker) -> None:
    tracker.start("run", config={})
    tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32("nan")}, step=0)
    (row,) = _strict(tracker.tracker)
    assert [row[key] for key in "abcd"] == ["NaN", "Infinity", "-Infinity", "NaN"]
    (read,) = read_metrics(tracker.tracker)
    assert math.isnan(read["a"])
    assert (read["b"], read["c"]) == (math.inf, -math.inf)


class OneElement:
    """Looks like a tensor, without torch."""

    dtype = "float32"

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.shape = shape

    def item(self) -> float:
        return 1.5

    def tolist(self) -> list[float]:
        return [1.5]


def test_arrays_of_one_element_become_numbers(tracker: JsonlTracker) -> None:
    tracker.start("run", config={})
    values = {
        "a": np.float64(0.5),
        "b": np.int64(3),
        "c": np.array([[2.0]]),
        "d": np.bool_(True),
        "e": OneElement((1, 1)),
    }
    tracker.log(values, step=np.int64(7))  # type: ignore[arg-type]
    (row,) = _strict(tracker.tracker)
    assert row["step"] == 7
    assert [row[key] for key in "abcde"] == [0.5, 3, 2.0, True, 1.5]
    assert type(row["d"]) is bool


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3)), r"The metric `loss` is a ndarray of shape \[2, 3\].*Log a reduction"),
        (OneElement((0,)), r"a OneElement of shape \[0\]"),
        ({"a": 1}, "The metric `loss` is a dict, which is neither a number nor text"),
        (object(), "The metric `loss` is a object, which is neither"),
        (1j, "is a complex"),
        (float, "is a type"),
    ],
)
def test_a_value_that_is_no_scalar_is_refused_by_name(tracker: JsonlTracker, value: object, message: str) -> None:
    tracker.start("run", config={})
    with pytest.raises(ConfigError, match=message):
        tracker.log({"fine": 1, "loss": value}, step=0)
    assert tracker.tracker.read_bytes() == b""


def test_a_metric_called_step_may_repeat_the_step(tracker: JsonlTracker) -> None:
    tracker.start("run", config={})
    tracker.log({"step": 4}, step=4)
    tracker.log({"step": 5}, step=None)
    assert [row["step"] for row in _strict(tracker.tracker)] == [4, 5]
    with pytest.raises(ConfigError, match=r"`step=6` takes the name of a column that holds 7.*`my_step`"):
        tracker.log({"step": 6}, step=7)
    with pytest.raises(ConfigError, match=r"`time=1.0` takes the name"):
        tracker.log({"time": 1.0}, step=8)


def test_starting_again_appends(tmp_path: Path) -> None:
    for step in range(3):
        tracker = JsonlTracker(tmp_path)
        tracker.start("run", config={})
        tracker.log({"loss": step}, step=step)
        tracker.finish()
    assert [row["step"] for row in _strict(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_other_hyperparameters_keep_the_earlier_ones(tmp_path: Path) -> None:
    for epochs in (1, 1, 2, 3):
        tracker = JsonlTracker(tmp_path)
        tracker.start("run", config={"epochs": epochs})
        tracker.finish()
    stored = {path.name: json.loads(path.read_text())["epochs"] for path in (tmp_path / "run").glob("config*")}
    assert stored == {"config.json": 3, "config.1.json": 1, "config.2.json": 2}


@pytest.mark.parametrize("torn", range(1, 39))
def test_a_line_torn_anywhere_is_repaired(tmp_path: Path, torn: int) -> None:
    whole, line = b'{"step": 0, "time": 1.0}\n' * 2, b'{"step": 2, "time": 1.0, "loss": "\xc3\xb6"}\n'
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(whole + line[:torn])
    tracker = JsonlTracker(tmp_path)
    tracker.start("run", config={})
    assert path.read_bytes() == whole
    tracker.log({"loss": 1}, step=2)
    tracker.finish()
    assert [row["step"] for row in _strict(path)] == [0, 0, 2]


@pytest.mark.parametrize("before", [b"", b'{"step": 0}\n'])
def test_a_torn_line_longer_than_a_block_is_repaired(tmp_path: Path, before: bytes) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(before + b'{"note": "' + b"x" * 200_000)
    tracker = JsonlTracker(tmp_path)
    tracker.start("run", config={})
    tracker.finish()
    assert path.read_bytes() == before


def test_a_whole_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"step": 0}\n' * 20_000)
    tracker = JsonlTracker(tmp_path)
    tracker.start("run", config={})
    tracker.finish()
    assert path.stat().st_size == 20_000 * 12


def test_reading_a_torn_file_says_where(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"ste')
    with pytest.raises(ConfigError, match=r"Line 2 of .*metrics\.jsonl is not JSON.*start the run again"):
        read_metrics(path)


@pytest.mark.parametrize("run", ["", " ", ".", "..", "a/../../b", "/tmp/run", "a\0b"])
def test_a_run_that_is_no_folder_inside_is_refused(tracker: JsonlTracker, run: str) -> None:
    with pytest.raises(ConfigError, match=r"`run=.* cannot name a folder inside the project's.*Give a name"):
        tracker.start(run, config={})


def test_a_second_start_is_refused_and_finish_is_idempotent(tracker: JsonlTracker) -> None:
    tracker.start("one", config={})
    with pytest.raises(ConfigError, match=r"'two' was to start, but this tracker is writing 'one'"):
        tracker.start("two", config={})
    tracker.finish()
    tracker.finish()
    tracker.start("two", config={})


def test_logging_outside_a_run_is_refused(tracker: JsonlTracker) -> None:
    with pytest.raises(AccelError, match="no run was started"):
        _ = tracker.tracker
    with pytest.raises(AccelError, match=r"`log` was called with 'loss', but no run is open"):
        tracker.log({"loss": 1.0}, step=0)


def test_lines_survive_a_process_that_dies(tmp_path: Path) -> None:
    code = (
        "import os, sys, accel_track; tracker = accel_track.JsonlTracker(sys.argv[1]); "
        "tracker.start('run', config={}); tracker.log({'loss': 1.0}, step=0); os._exit(9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert ended.returncode == 9
    assert [row["step"] for row in _strict(tmp_path / "run" / "metrics.jsonl")] == [0]
