"""Windows: what their gradients are divided by, for any way of cutting them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accel_parallel import Accumulation, GradientAccumulationPlugin, SingleStrategy
from accel_state import ConfigError, Process, ProcessSettings


def single() -> SingleStrategy:
    with Process.open(ProcessSettings(device="cpu")) as process:
        return SingleStrategy(process)


def accumulation(num_steps: int, *, sync_with_dataloader: bool = True) -> Accumulation:
    plugin = GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=sync_with_dataloader)
    return Accumulation(plugin, single())


class Line:
    """One weight, whose gradient of ``sum(weight * x)`` is ``sum(x)``."""

    def __init__(self, window_of: Accumulation) -> None:
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.accumulation = window_of
        self.window = window_of.bind([self.weight])

    def backward(self, loss: torch.Tensor, num_items: int | float | torch.Tensor | None = None) -> None:
        self.accumulation.scale_loss(loss, num_items).backward()
        self.accumulation.after_backward()

    def gradient(self) -> float:
        assert self.weight.grad is not None
        return self.weight.grad.item()

    def step(self) -> None:
        self.weight.grad = None
        self.window.taken()


@given(
    num_steps=st.integers(1, 6),
    epochs=st.lists(st.lists(st.lists(st.floats(-9, 9), max_size=4), min_size=1, max_size=9), min_size=1, max_size=3),
    known=st.booleans(),
    by_items=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_window_has_the_gradient_of_the_whole(
    num_steps: int, epochs: list[list[list[float]]], known: bool, by_items: bool
) -> None:
    run = accumulation(num_steps)
    line = Line(run)
    for epoch in epochs:
        held: list[list[float]] = []
        for index, rows in enumerate(epoch):
            left = len(epoch) - 1 - index
            with run.enter(None, left if known or left == 0 else None):
                held.append(rows)
                total = (line.weight * torch.tensor(rows, dtype=torch.float64)).sum()
                if by_items:
                    line.backward(total, len(rows))
                else:
                    line.backward(total)
                assert run.sync_gradients == (len(held) == num_steps or left == 0)
                assert run.unfinished == len(held)
            if run.sync_gradients:
                divisor = max(1, sum(map(len, held))) if by_items else len(held)
                assert line.gradient() == pytest.approx(math.fsum(map(math.fsum, held)) / divisor, abs=1e-10)
                line.step()
                held = []
                assert run.between_windows
                assert run.unfinished == 0


def test_a_window_goes_on_over_epochs_when_told_so() -> None:
    run = accumulation(3, sync_with_dataloader=False)
    line = Line(run)
    for left in (1, 0, 1):
        with run.enter(None, left):
            line.backward(line.weight * 6)
    assert run.sync_gradients
    assert line.gradient() == pytest.approx(6.0)


def test_a_window_that_an_epoch_broke_off_is_divided_by_what_it_held() -> None:
    run = accumulation(4)
    line = Line(run)
    with run.enter(None, 1):  # the epoch announces two, and is given up with `break`
        line.backward(line.weight * 2)
    for left in (9, 8, 7):
        with run.enter(None, left):
            line.backward(line.weight * 2)
    assert run.sync_gradients
    assert line.gradient() == pytest.approx(2.0)


def test_several_losses_of_one_micro_batch_are_added() -> None:
    run = accumulation(4)
    line = Line(run)
    for left in (None, 0):
        with run.enter(None, left):
            line.backward(line.weight * 2)
            line.backward(line.weight * 3)
    assert line.gradient() == pytest.approx(5.0)


def test_a_script_that_counts_by_itself_divides_by_what_it_announced() -> None:
    run = accumulation(4)
    line = Line(run)
    for _ in range(4):
        line.backward(line.weight * 8)
    assert line.gradient() == pytest.approx(8.0)
    assert run.sync_gradients


def test_gradients_of_a_window_that_nobody_stepped_do_not_count_as_its_own() -> None:
    run = accumulation(2)
    line = Line(run)
    for _ in range(2):
        with run.enter(None, None):
            line.backward(line.weight)
    with run.enter(None, None):
        assert not line.window.accumulating  # so a zero_grad() here clears what is left over
        line.backward(line.weight)
        assert line.window.accumulating


def test_windows_that_are_restarted_forget_what_they_held() -> None:
    run = accumulation(3)
    line = Line(run)
    for num_items in (None, 4):
        with run.enter(None, None):
            line.backward(line.weight, num_items)
        assert run.unfinished == 1
        line.weight.grad = None
        run.restart()
        assert (run.unfinished, run.between_windows, run.sync_gradients) == (0, True, True)
        assert not line.window.accumulating
    for _ in range(3):
        with run.enter(None, None):
            line.backward(line.weight * 3)
    assert line.gradient() == pytest.approx(3.0)
    assert run.windows == (line.window,)
    assert len(accumulation(1).windows) == 1


def test_the_scale_of_a_window_does_not_show_in_its_gradient() -> None:
    gradients = []
    for before in (None, 5, 1000):  # items of an earlier window, or none, as after a resume
        run = accumulation(2)
        line = Line(run)
        if before is not None:
            for left in (1, 0):
                with run.enter(None, left):
                    line.backward(line.weight, before)
            line.step()
        for left in (1, 0):
            with run.enter(None, left):
                line.backward(line.weight * 0.1, 7)
        gradients.append(line.gradient())
    assert gradients[0] == gradients[1] == gradients[2] == pytest.approx(0.2 / 14)


def test_windows_of_two_optimizers_end_apart() -> None:
    run = accumulation(2)
    first, second = Line(run), Line(run)
    assert run.windows_of([first.weight]) == (first.window,)
    assert run.windows_of([]) == (first.window, second.window)
    with run.enter([first.window], None):
        first.backward(first.weight)
    assert (first.window.micro_steps, second.window.micro_steps) == (1, 0)
    with run.enter(None, None):
        assert (first.window.sync, second.window.sync) == (True, False)
        assert not run.sync_gradients
    assert run.unfinished == 2


def test_one_loss_for_windows_of_other_lengths_is_refused() -> None:
    run = accumulation(3)
    first, second = Line(run), Line(run)
    with run.enter([first.window], None):
        first.backward(first.weight)
    with run.enter(None, 0), pytest.raises(ConfigError, match=r"divided by \[1, 3\] micro-batches"):
        run.scale_loss(first.weight + second.weight)


def test_one_loss_for_windows_with_other_references_is_refused() -> None:
    run = accumulation(2)
    first, second = Line(run), Line(run)
    for _ in range(3):
        with run.enter([first.window], None):
            first.backward(first.weight, 7)
    for lines in ([second.window], None):
        with run.enter(lines, None):
            if lines is None:
                with pytest.raises(ConfigError, match="windows began at different micro-batches"):
                    run.scale_loss(first.weight + second.weight, 3)
            else:
                run._reference = torch.tensor(2.0)
                second.backward(second.weight, 3)


@pytest.mark.parametrize("first", [None, 4])
def test_both_forms_in_one_window_are_refused(first: int | None) -> None:
    run = accumulation(3)
    line = Line(run)
    with run.enter(None, None):
        line.backward(line.weight, first)
    with run.enter(None, None), pytest.raises(ConfigError, match="have no common unit"):
        line.backward(line.weight, 4 if first is None else None)


def test_another_window_may_take_the_other_form() -> None:
    run = accumulation(2)
    line = Line(run)
    for num_items in (None, None, 4, 4):
        with run.enter(None, None):
            line.backward(line.weight * (8 if num_items else 1), num_items)
        if run.sync_gradients:
            assert line.gradient() == pytest.approx(2.0 if num_items else 1.0)
            line.step()


def test_items_of_one_micro_batch_counted_twice_are_refused() -> None:
    run = accumulation(3)
    line = Line(run)
    with run.enter(None, None):
        line.backward(line.weight, 2)
        with pytest.raises(ConfigError, match="called twice for one micro-batch"):
            line.backward(line.weight, 2)


def test_items_outside_a_window_of_several_are_refused() -> None:
    run = accumulation(3)
    with pytest.raises(ConfigError, match="outside `accumulate"):
        run.scale_loss(Line(run).weight * 1, 2)
    assert accumulation(1).scale_loss(torch.tensor(6.0), 3).item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("num_items", "message"),
    [
        (-1, "`num_items=-1` is no count"),
        (torch.tensor(-2), "`num_items=-2` is no count"),
        (float("nan"), "`num_items=nan` is no count"),
        (math.inf, "`num_items=inf` is no count"),
        (torch.tensor([1, 2]), r"`num_items` has shape \(2,\)"),
        ([3], "`num_items` is a list"),
        ("3", "`num_items` is a str"),
    ],
)
def test_counts_that_are_none_are_refused(num_items: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accumulation(1).scale_loss(torch.tensor(1.0), num_items)


def test_a_window_without_items_has_gradients_of_zero() -> None:
    run = accumulation(2)
    line = Line(run)
    for left in (1, 0):
        with run.enter(None, left):
            line.backward(line.weight * 0, 0)
    assert line.gradient() == 0.0


def test_gradients_of_several_dtypes_are_corrected() -> None:
    run = accumulation(4)
    weights = [nn.Parameter(torch.zeros((), dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    run.bind([*weights, nn.Parameter(torch.zeros(()))])  # one without a gradient
    for left in (None, 0):
        with run.enter(None, left):
            loss = torch.stack([weight.double() * 12 for weight in weights]).sum()
            run.scale_loss(loss, 3).backward()
            run.after_backward()
    assert [weight.grad.item() for weight in weights if weight.grad is not None] == pytest.approx([4, 4, 4], rel=1e-2)


def test_a_micro_batch_inside_another_gives_back_its_windows() -> None:
    run = accumulation(1)
    first, second = Line(run), Line(run)
    with run.enter([first.window], None):
        with run.enter([second.window], None):
            pass
        first.backward(first.weight * 3)
        assert (first.window.pending, second.window.pending) == (True, False)


def test_a_failing_micro_batch_leaves_no_scope_open() -> None:
    run = accumulation(3)
    line = Line(run)
    with pytest.raises(RuntimeError, match="out of memory"), run.enter(None, None):
        raise RuntimeError("out of memory")
    with pytest.raises(ConfigError, match="outside `accumulate"):
        run.scale_loss(line.weight * 1, 2)


@pytest.mark.parametrize("num_steps", [0, -3, 2.0, True, "2"])
def test_windows_hold_at_least_one_micro_batch(num_steps: int) -> None:
    with pytest.raises(ConfigError, match="is not a number of micro-batches"):
        GradientAccumulationPlugin(num_steps=num_steps)
