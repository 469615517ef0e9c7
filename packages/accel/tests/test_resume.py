"""A run that is resumed from any batch goes on as if it had never stopped: same samples, same losses to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import (
    Accelerator,
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    set_seed,
    skip_first_batches,
)
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

NUM_ROWS = 22
BATCH = 2
EPOCHS = 2
Row = tuple[int, list[int], float, float]
"""Of a micro-batch: epoch, this rank's ids, loss, learning rate after it."""


class Tally:
    """Something of the script's own to save, the same on all ranks: the samples that were seen."""

    def __init__(self) -> None:
        self.seen = torch.zeros(NUM_ROWS, dtype=torch.int64)
        self.notes: dict[str, Any] = {"batches": 0}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, **self.notes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict.pop("seen")
        self.notes = state_dict


class Run:
    """A training script on a rank, with everything that a checkpoint holds."""

    def __init__(self, *, window: int = 1, dropout: float = 0.5, precision: Any = "no", across: bool = False) -> None:
        set_seed(11)
        scaler = [GradScalerKwargs(init_scale=2.0**10, growth_interval=3)] if precision == "fp16" else []
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=precision,
            kwargs_handlers=scaler,
            dataloader_config=DataLoaderConfiguration(data_seed=4),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=window, sync_with_dataloader=not across),
        )
        values = torch.randn(NUM_ROWS, 3, generator=torch.Generator().manual_seed(1))
        data = DataLoader(TensorDataset(torch.arange(NUM_ROWS), values), batch_size=BATCH, shuffle=True)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 7], gamma=0.5)
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            model, optimizer, data, schedule
        )
        self.tally = Tally()
        self.accelerator.register_for_checkpointing(self.tally)
        self.rows: list[Row] = []

    def step(self, ids: torch.Tensor, values: torch.Tensor, *, by_items: bool = False) -> None:
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            each = (self.model(values).float() - ids.unsqueeze(1) / NUM_ROWS) ** 2
            loss = each.sum() if by_items else each.mean()
            accelerator.backward(loss, num_items=int(ids.sum()) + 1 if by_items else None)
            accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.tally.seen[accelerator.gather_for_metrics(ids)] += 1
        self.tally.notes["batches"] += 1
        self.rows.append((self.data.epoch, ids.tolist(), loss.item(), self.schedule.get_last_lr()[0]))

    def go_on(self, *, save_to: Path | None = None, by_items: bool = False) -> Run:
        """Train to the end, after the recipe of every example; with `save_to`, saving after every batch."""
        for _ in range(self.data.epoch, EPOCHS):
            for ids, values in self.data:
                self.step(ids, values, by_items=by_items)
                if save_to is not None:
                    self.accelerator.save_state(save_to / f"after_{len(self.rows)}")
        return self

    def state(self) -> list[torch.Tensor]:
        """Every number that training has changed."""
        moments = [entry for each in self.optimizer.state.values() for entry in each.values()]
        scale = torch.tensor(getattr(self.accelerator._engine.precision.scaler, "get_scale", lambda: 0.0)())
        return [*self.model.state_dict().values(), *moments, scale, self.tally.seen, torch.rand(3)]


def resume_everywhere(folder: str, precision: str) -> int:
    """On a rank: save after every batch of two epochs, resume from each, and compare with the run that went on."""
    root = Path(folder)
    whole = Run(precision=precision).go_on(save_to=root)
    expected = whole.state()
    for done in range(1, len(whole.rows) + 1):
        torch.rand(done)  # generators that are somewhere else
        resumed = Run(precision=precision)
        assert resumed.accelerator.load_state(root / f"after_{done}") == root / f"after_{done}"
        assert resumed.tally.notes["batches"] == done
        resumed.go_on()
        assert resumed.rows == whole.rows[done:]
        assert all(torch.equal(one, two) for one, two in zip(resumed.state(), expected, strict=True))
        assert resumed.optimizer.steps_taken == whole.optimizer.steps_taken
    return len(whole.rows)


def ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    return run_ranks(function, world, *args, settings=ProcessSettings(device="cpu"), timeout_s=110)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_run_resumed_from_any_batch_equals_the_one_that_went_on(world: int, precision: str, tmp_path: Path) -> None:
    assert ranks(resume_everywhere, world, str(tmp_path), precision) == [EPOCHS * (11 if world == 1 else 6)] * world


def resume_in_windows(folder: str, window: int, by_items: bool, across: bool) -> list[tuple[int, int]]:
    """On a rank: the same in windows of several micro-batches. Returns from which batch each resume went on."""
    root = Path(folder)
    whole = Run(window=window, dropout=0.0, across=across).go_on(save_to=root, by_items=by_items)
    places = []
    for done in range(1, len(whole.rows) + 1):
        resumed = Run(window=window, dropout=0.0, across=across)
        resumed.accelerator.load_state(root / f"after_{done}")
        resumed.go_on(by_items=by_items)
        begin = len(whole.rows) - len(resumed.rows)
        assert resumed.rows == whole.rows[begin:], (done, begin)
        weights = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in weights), done
        places.append((done, begin))
    return places


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("by_items", [False, True], ids=["plain", "num_items"])
def test_inside_a_window_a_resumed_run_begins_with_the_window(world: int, by_items: bool, tmp_path: Path) -> None:
    length = 11 if world == 1 else 6
    expected = []
    for done in range(1, EPOCHS * length + 1):
        epoch, inside = divmod(done - 1, length)
        ends = inside + 1 == length or (inside + 1) % 4 == 0  # windows of four; the epoch's last one is shorter
        expected.append((done, done if ends else epoch * length + inside // 4 * 4))
    for places in ranks(resume_in_windows, world, str(tmp_path), 4, by_items, False):
        assert places == expected


def test_a_window_that_reaches_over_an_epoch_is_begun_again_in_the_epoch_before(tmp_path: Path) -> None:
    (places,) = ranks(resume_in_windows, 1, str(tmp_path), 4, False, True)
    assert places == [(done, done // 4 * 4) for done in range(1, 2 * 11 + 1)]


def ids_of_epochs(load: str | None, save: str | None, stop: int) -> list[int]:
    """On a rank: real ids of all ranks in order, from a checkpoint on; with `save`, up to a checkpoint."""
    run = Run()
    if load is not None:
        run.accelerator.load_state(load)
    found: list[int] = []
    for _ in range(run.data.epoch, EPOCHS):
        for index, (ids, values) in enumerate(run.data, 1):
            run.step(ids, values)
            found += run.accelerator.gather_for_metrics(ids).tolist()
            if save is not None and index == stop:
                run.accelerator.save_state(save)
                return found
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 3), (3, 2)])
def test_another_number_of_processes_sees_the_same_order(before: int, after: int, tmp_path: Path) -> None:
    (whole,) = ranks(ids_of_epochs, 1, None, None, 0)
    first = ranks(ids_of_epochs, before, None, str(tmp_path / "saved"), 2)[0]
    for rest in ranks(ids_of_epochs, after, str(tmp_path / "saved"), None, 0):
        assert first + rest == whole


def test_the_place_is_that_of_the_loop_that_feeds_the_window(alone: None, tmp_path: Path) -> None:
    """A checkpoint may be saved inside an evaluation, between two loaders, or through `skip_first_batches`."""
    run = Run(window=4)
    evaluation = run.accelerator.prepare(DataLoader(TensorDataset(torch.arange(6)), batch_size=BATCH))
    for index, (ids, values) in enumerate(run.data, 1):
        run.step(ids, values)
        if index == 6:
            for number, _ in enumerate(evaluation, 1):
                if number == 2:
                    run.accelerator.save_state(tmp_path / "inside")
            break
    resumed = Run(window=4)
    evaluation = resumed.accelerator.prepare(DataLoader(TensorDataset(torch.arange(6)), batch_size=BATCH))
    resumed.accelerator.load_state(tmp_path / "inside")
    assert [resumed.data.state_dict()[key] for key in ("epoch", "cursor")] == [0, 4 * BATCH]
    assert [evaluation.state_dict()[key] for key in ("epoch", "cursor")] == [0, 2 * BATCH]


def test_two_loaders_that_feed_one_window_both_go_back(alone: None, tmp_path: Path) -> None:
    run = Run(window=4)
    other = run.accelerator.prepare(DataLoader(TensorDataset(torch.arange(40)), batch_size=1))
    for index, ((ids, values), _) in enumerate(zip(run.data, other, strict=False), 1):
        run.step(ids, values)
        if index == 7:
            run.accelerator.save_state(tmp_path / "saved")
            break
    resumed = Run(window=4)
    other = resumed.accelerator.prepare(DataLoader(TensorDataset(torch.arange(40)), batch_size=1))
    resumed.accelerator.load_state(tmp_path / "saved")
    assert resumed.data.state_dict()["cursor"] == 4 * BATCH
    assert other.state_dict()["cursor"] == 4


def test_batches_that_the_script_passes_over_come_again_too(alone: None, tmp_path: Path) -> None:
    """Every second batch is used; the seventh is at the second micro-batch of a window that began after the fourth."""
    run = Run(window=2)
    for index, (ids, values) in enumerate(run.data):
        if index % 2:
            run.step(ids, values)
        if index == 6:
            run.accelerator.save_state(tmp_path / "saved")
            break
    resumed = Run(window=2)
    resumed.accelerator.load_state(tmp_path / "saved")
    assert resumed.data.state_dict()["cursor"] == 4 * BATCH


@pytest.mark.parametrize("window", [1, 4])
def test_skipping_first_batches_and_saving_in_the_loop(window: int, alone: None, tmp_path: Path) -> None:
    whole = Run(window=window, dropout=0.0)
    for index, (ids, values) in enumerate(whole.data, 1):
        whole.step(ids, values)
        if index == 4:
            whole.accelerator.save_state(tmp_path / "fourth")
    again = Run(window=window, dropout=0.0)
    again.accelerator.load_state(tmp_path / "fourth")
    again.data.set_epoch(1)
    again.data.set_epoch(0)  # the recipe of old: from the epoch's beginning, and past what was done
    for index, (ids, values) in enumerate(skip_first_batches(again.data, 4), 5):
        again.step(ids, values)
        if index == 6:
            again.accelerator.save_state(tmp_path / "sixth")
    assert [row[1:] for row in again.rows] == [row[1:] for row in whole.rows[4:]]
    resumed = Run(window=window, dropout=0.0)
    resumed.accelerator.load_state(tmp_path / "sixth")
    for ids, values in resumed.data:
        resumed.step(ids, values)
    assert resumed.rows == whole.rows[4 if window == 4 else 6 :]


def test_restoring_inside_a_window_gives_its_gradients_up(alone: None, tmp_path: Path) -> None:
    run = Run(window=4, dropout=0.0)
    batches = list(run.data)
    run.accelerator.save_state(tmp_path / "start")
    for ids, values in batches[:6]:
        run.step(ids, values)
    run.accelerator.load_state(tmp_path / "start")
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run.rows.clear()
    for ids, values in batches[:4]:
        run.step(ids, values)
    fresh = Run(window=4, dropout=0.0)
    for ids, values in batches[:4]:
        fresh.step(ids, values)
    assert [row[2] for row in run.rows] == [row[2] for row in fresh.rows]
    for one, two in zip(run.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, two)
