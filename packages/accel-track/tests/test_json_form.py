"""Odd hyperparameters as readable JSON."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_track import config_form


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Inner:
    path: Path
    colour: Colour


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    rates: tuple[float, ...]


class DType:
    """Prints as torch's dtypes do."""

    def __str__(self) -> str:
        return "torch.bfloat16"


def test_nested_dataclasses() -> None:
    value = Outer(Inner(PurePosixPath("/data"), Colour.RED), (0.1, math.nan))  # type: ignore[arg-type]
    assert config_form(value) == {"inner": {"path": "/data", "colour": "red"}, "rates": [0.1, "NaN"]}


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (DType(), "torch.bfloat16"),
        (Level.LOW, 1),
        (Colour.PAIR, [1, 2]),
        (argparse.Namespace(lr=0.1, out=PurePosixPath("x")), {"lr": 0.1, "out": "x"}),
        ({1: "a", Colour.RED: "b", (1, 2): "c", None: "d"}, {"1": "a", "red": "b", "(1, 2)": "c", "None": "d"}),
        ({"b", "a", 3}, ["a", "b", 3]),
        (range(3), [0, 1, 2]),
        (collections.namedtuple("Pair", "x y")(1, math.inf), [1, "Infinity"]),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 12), "2024-05-01T12:00:00"),
        (datetime.timedelta(minutes=1), "0:01:00"),
        (b"ab", "b'ab'"),
        (math.sqrt, "math.sqrt"),
        (Path, f"{Path.__module__}.Path"),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.zeros(0), []),
        (np.zeros((2, 1000)), "ndarray of float64, shape [2, 1000]"),
        (np.float32, "numpy.float32"),
        (np.dtype("float32"), "float32"),
        (Inner, f"{Inner.__module__}.Inner"),
        (-math.inf, "-Infinity"),
        (1j, "1j"),
    ],
)
def test_odd_values(value: Any, form: Any) -> None:
    assert config_form(value) == form


def test_a_structure_that_contains_itself() -> None:
    value: dict[str, Any] = {"lr": 0.1}
    value["self"] = [value]
    assert config_form(value) == {"lr": 0.1, "self": ["(contains itself)"]}
    shared = [1]
    assert config_form([shared, shared]) == [[1], [1]]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=8,
)


@given(_JSON)
def test_json_values_stay_as_they_are(value: Any) -> None:
    assert config_form(value) == value
    json.dumps(config_form(value), allow_nan=False)
