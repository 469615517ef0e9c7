"""What `accel checkpoint diff` counts as different, and what it leaves unread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_parallel.checkpoint import About, Item, write_checkpoint
from accel_parallel.checkpoint_commands import comparison, main
from accel_parallel.checkpoint_commands.comparison import Tolerance, compare_states
from accel_state.errors import ConfigError

Diff = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Diff:
    """Compare two states of a model, or two sets of items; the exit code and what was printed after the heads."""

    def run(a: Any, b: Any, *words: str) -> tuple[int, list[str]]:
        folders = []
        for name, state in (("a", a), ("b", b)):
            items = state if isinstance(state, list) else [Item("model", "model", state)]
            folder = write_checkpoint(tmp_path / name, items, about=About(step=1, strategy="single"), sync=False)
            folders.append(str(folder))
        capsys.readouterr()
        code = main(["diff", *folders, *words])
        return code, capsys.readouterr().out.splitlines()[2:]

    return run


def test_the_same_is_the_same_and_is_not_read(diff: Diff, monkeypatch: Any) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(comparison, "compare_tensors", fail)
    assert diff({"w": torch.ones(3)}, {"w": torch.ones(3)}) == (0, ["model: the same"])


def test_tensors_are_named_with_how_much_differs(diff: Diff) -> None:
    a = {"w": torch.zeros(2, 3), "v": torch.ones(4), "n": torch.tensor([1, 2]), "s": torch.tensor(1.0)}
    b = {**a, "w": torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, -2.0]]), "n": torch.tensor([1, 7])}
    assert diff(a, b) == (
        1,
        [
            "model: differs",
            "  values of 2 of 4 common tensors, by at most 5",
            "  n: 1 of 2 values, by at most 5",
            "  w: 2 of 6 values, by at most 2",
        ],
    )


def test_other_names_shapes_and_dtypes(diff: Diff) -> None:
    a = {"only": torch.ones(1), "shape": torch.ones(2, 2), "dtype": torch.ones(2)}
    b = {"more": torch.ones(1), "shape": torch.ones(4), "dtype": torch.ones(2, dtype=torch.float16)}
    code, lines = diff(a, b)
    assert code == 1
    assert lines[1:] == [
        "  only: only in A",
        "  more: only in B",
        "  dtype: float32 [2] in A, float16 [2] in B",
        "  shape: float32 [2, 2] in A, float32 [4] in B",
    ]


def test_items_of_one_alone_and_values_beside_tensors(diff: Diff) -> None:
    def items(lr: float, step: int, **more: Any) -> list[Item]:
        state = {"w": {"m": torch.ones(2), "step": step}}
        return [
            Item("optimizer", "optimizer", {"state": state, "groups": [{"lr": lr, "betas": (0.9, 0.99), **more}]}),
            Item("scheduler", "scheduler", {"last_epoch": 4}),
        ]

    code, lines = diff(items(0.1, 3), [items(0.2, 3, fused=True)[0], Item("scaler", "scaler", {"scale": 2.0})])
    assert code == 1
    assert lines == [
        "optimizer: differs",
        "  groups.0.lr: 0.1 in A, 0.2 in B",
        "  groups.0.fused: True only in B",
        "scheduler: differs",
        "  only in A, not in B",
        "scaler: differs",
        "  only in B, not in A",
    ]
    assert diff(items(0.1, 3), items(0.1 + 1e-9, 3), "--rtol", "1e-6")[0] == 0
    assert diff(items(0.1, 3), items(0.2, 3), "--item", "scheduler") == (0, ["scheduler: the same"])
    with pytest.raises(ConfigError, match=r"`--item model` is in neither checkpoint. They hold optimizer, scheduler"):
        diff(items(0.1, 3), items(0.2, 3), "--item", "model")


def test_nan_equals_nan_and_infinities_are_never_near(diff: Diff) -> None:
    nan, inf = float("nan"), float("inf")
    assert diff({"w": torch.tensor([nan, inf, 0.0])}, {"w": torch.tensor([nan, inf, -0.0])})[0] == 0
    code, lines = diff({"w": torch.tensor([nan, 1.0])}, {"w": torch.tensor([1.0, 1.0])})
    assert code == 1
    assert lines[-1] == "  w: 1 of 2 values, by at most nan"
    assert diff({"w": torch.tensor([1.0])}, {"w": torch.tensor([inf])}, "--rtol", "1")[0] == 1


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.uint64, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64],
    ids=str,
)
def test_every_dtype_is_compared(diff: Diff, dtype: torch.dtype) -> None:
    ones = torch.ones(3).to(dtype)
    zeros = torch.tensor([1.0, 0.0, 1.0]).to(dtype)
    code, lines = diff({"w": ones}, {"w": zeros})
    assert code == 1
    assert lines[-1] == "  w: 1 of 3 values, by at most 1"
    assert diff({"w": ones}, {"w": ones.clone()})[0] == 0


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    shift=st.floats(0, 2, width=32),
    rtol=st.sampled_from([0.0, 1e-3]),
    atol=st.sampled_from([0.0, 0.5]),
    piece=st.integers(4, 64),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_one_comparison_of_all(
    values: list[float], shift: float, rtol: float, atol: float, piece: int
) -> None:
    a = torch.tensor(values, dtype=torch.float32)
    b = a.clone()
    b[::3] += shift
    found = [stored(each) for each in (a, b)]
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_PIECE_BYTES", piece)
        difference = comparison._compare(found[0], found[1], Tolerance(rtol, atol), steps.append)
    differ = ~torch.isclose(a.double(), b.double(), rtol=rtol, atol=atol)
    assert difference.count == int(differ.sum())
    assert difference.largest == (float((a.double() - b.double()).abs()[differ].max()) if difference.count else 0.0)
    assert sum(steps) == a.nbytes


def stored(tensor: torch.Tensor) -> Any:
    class File:
        def view(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
            return tensor[rows]

    class Stored:
        shape, dtype, nbytes, name, file = tensor.shape, tensor.dtype, tensor.nbytes, "w", File()

    return Stored()


def test_long_lists_are_cut_unless_asked_for(diff: Diff) -> None:
    a = {f"w{number}": torch.zeros(1) for number in range(30)}
    b = {name: tensor + 1 for name, tensor in a.items()}
    assert diff(a, b)[1][-1] == "  ... and 11 more; `--all` shows them"
    assert len(diff(a, b, "--all")[1]) == 32


def test_states_of_other_types() -> None:
    assert list(compare_states({"a": 1}, {"a": 1.0}, Tolerance())) == ["a: 1 in A, 1.0 in B"]
    assert list(compare_states([1, 2], [1], Tolerance(), "x")) == ["x: 2 entries in A, 1 in B"]
    assert list(compare_states((1,), [1], Tolerance(), "x")) == ["x: (1,) in A, [1] in B"]
    assert list(compare_states(float("nan"), float("nan"), Tolerance(), "x")) == []
