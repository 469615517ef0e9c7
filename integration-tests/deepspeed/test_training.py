"""Training with DeepSpeed through the `Accelerator`: exact where DeepSpeed alone is not, resumed bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from accel import Accelerator
from accel_parallel import checkpoint_activations
from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_state.errors import ConfigError
from accel_state.testing import run_ranks

WORLD = 2
OFFLOADED = [(1, "none"), (2, "none"), (3, "none"), (1, "cpu"), (2, "cpu"), (3, "cpu")]
Step = Callable[["Run"], None]


def plugin(stage: int, device: str = "none", **settings: Any) -> DeepSpeedPlugin:
    offload = {"offload_optimizer_device": device} if device != "none" else {}
    return DeepSpeedPlugin(zero_stage=stage, **offload, **settings)  # type: ignore[arg-type]


class Branches(nn.Module):
    """Two layers, of which the second takes part only while it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.both = True

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, 8) to (rows, 8)."""
        hidden: torch.Tensor = self.first(rows)
        return self.second(torch.tanh(hidden)) if self.both else hidden


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make()


def batch(number: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + rank))


def loss_of(model: nn.Module, number: int, rank: int) -> torch.Tensor:
    return (model(batch(number, rank)) - 1).pow(2).mean()


class Run:
    """A model under DeepSpeed, or the same in one process on the data of all ranks."""

    def __init__(self, accelerator: Accelerator | None, make: Any = torch.optim.SGD, **settings: Any) -> None:
        self.accelerator = accelerator
        self.inner: Any = seeded(Branches)
        self.optimizer = make(self.inner.parameters(), lr=0.1, **settings)
        self.model = self.inner
        if accelerator is not None:
            self.model, self.optimizer = accelerator.prepare(self.inner, self.optimizer)

    def backward(self, number: int, weight: float = 1.0) -> None:
        if self.accelerator is not None:
            self.accelerator.backward(weight * loss_of(self.model, number, self.accelerator.process_index))
        else:
            losses = [loss_of(self.model, number, rank) for rank in range(WORLD)]
            (weight * torch.stack(losses).mean()).backward()  # type: ignore[no-untyped-call, unused-ignore]

    def clip(self, norm: float) -> float:
        clip = nn.utils.clip_grad_norm_ if self.accelerator is None else self.accelerator.clip_grad_norm_
        return float(clip(self.model.parameters(), norm))

    def clamp(self, value: float) -> None:
        clamp = nn.utils.clip_grad_value_ if self.accelerator is None else self.accelerator.clip_grad_value_
        clamp(self.model.parameters(), value)

    def weights(self) -> dict[str, torch.Tensor]:
        if self.accelerator is None:
            return {name: value.detach().clone() for name, value in self.inner.state_dict().items()}
        return {name: value.clone() for name, value in self.accelerator.strategy.full_state(self.model).items()}


def several_backwards(run: Run) -> None:
    """A script that counts by itself: three backwards, then a step."""
    for step in range(3):
        for number in range(3):
            run.backward(3 * step + number, weight=1 / 3)
        run.optimizer.step()
        run.optimizer.zero_grad()


def unused(run: Run) -> None:
    """A layer that every second window leaves out, and windows whose second micro-batch alone uses it."""
    for step in range(6):
        run.inner.both = step % 2 == 0
        run.backward(2 * step, weight=0.5)
        run.inner.both = step % 3 == 0
        run.backward(2 * step + 1, weight=0.5)
        run.optimizer.step()
        run.optimizer.zero_grad()


def dropped(run: Run) -> None:
    """Gradients that are thrown away before they were stepped on."""
    for number in range(4):
        run.backward(number)
        if number % 2:
            run.optimizer.step()
        run.optimizer.zero_grad()


def clipped(run: Run) -> None:
    for number in range(4):
        run.backward(number)
        norm = run.clip(0.05)
        assert norm > 0.05
        run.optimizer.step()
        run.optimizer.zero_grad()


def clamped(run: Run) -> None:
    for number in range(3):
        run.backward(number)
        run.clamp(0.01)
        run.optimizer.step()
        run.optimizer.zero_grad()


def forwards_first(run: Run) -> None:
    """Two forwards, and only then the backward of each, as of a pair of losses."""
    for step in range(3):
        if run.accelerator is not None:
            rank = run.accelerator.process_index
            losses = [loss_of(run.model, 2 * step + number, rank) for number in (0, 1)]
            for loss in losses:
                run.accelerator.backward(loss)
        else:
            run.backward(2 * step)
            run.backward(2 * step + 1)
        run.optimizer.step()
        run.optimizer.zero_grad()


BODIES: list[Step] = [several_backwards, forwards_first, unused, dropped, clipped]


def trained(stage: int, device: str) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for body in [*BODIES, *([clamped] if device == "none" else [])]:
        accelerator = Accelerator(deepspeed_plugin=plugin(stage, device))
        run = Run(accelerator)
        body(run)
        found[body.__name__] = run.weights()
        accelerator.free_memory()
    return found


@pytest.mark.parametrize(("stage", "device"), [(0, "none"), *OFFLOADED])
def test_what_is_done_with_gradients_equals_one_process(stage: int, device: str) -> None:
    """ZeRO alone drops the first of two backwards at stages 1 and 2, and steps on stale gradients at stage 3."""
    of_ranks = run_ranks(trained, WORLD, stage, device, timeout_s=100)
    for body in [*BODIES, *([clamped] if device == "none" else [])]:
        reference = Run(None)
        body(reference)
        for found in of_ranks:
            for name, value in reference.weights().items():
                torch.testing.assert_close(found[body.__name__][name], value, rtol=0, atol=2e-6, msg=body.__name__)


def by_hand(stage: int) -> list[str]:
    accelerator = Accelerator(deepspeed_plugin=plugin(stage))
    run = Run(accelerator)
    loss_of(run.model, 0, accelerator.process_index).backward()  # type: ignore[no-untyped-call, unused-ignore]
    messages = []
    with pytest.raises(ConfigError, match="its gradients are nowhere") as refused:
        run.optimizer.step()
    messages.append(str(refused.value))
    with pytest.raises(ConfigError, match="Load them before `prepare`, or by") as refused:
        accelerator.unwrap_model(run.model).load_state_dict(seeded(Branches).state_dict())
    messages.append(str(refused.value))
    return messages


@pytest.mark.parametrize("stage", [2, 3])
def test_what_goes_past_the_accelerator_is_told_and_not_lost(stage: int) -> None:
    assert all(len(messages) == 2 for messages in run_ranks(by_hand, 2, stage))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, 8) to (rows, 8)."""
        hidden: torch.Tensor = self.second(torch.tanh(self.first(rows)))
        return hidden


def tied(folder: str) -> dict[str, torch.Tensor]:
    accelerator = Accelerator(deepspeed_plugin=plugin(3))
    made = seeded(Tied)
    prepared: Any = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1))
    accelerator.save_model(prepared[0], folder)
    return accelerator.get_state_dict(prepared[0])


def test_tied_weights_are_gathered_once_on_every_rank(tmp_path: Path) -> None:
    found = run_ranks(tied, 2, str(tmp_path))
    wanted = seeded(Tied).state_dict()
    assert found[1] == {}
    assert all(torch.equal(found[0][name], value) for name, value in wanted.items())
    assert load_file(tmp_path / "model.safetensors").keys() == {"first.weight"}


def norms_measured(stage: int) -> list[int]:
    run = Run(Accelerator(deepspeed_plugin=plugin(stage)))
    strategy: Any = run.accelerator.strategy  # type: ignore[union-attr]
    kind: Any = type(strategy._only.engine.optimizer)
    name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    whole, counts = getattr(kind, name), [0]

    def measure(*given: Any, **settings: Any) -> Any:
        counts[-1] += 1
        return whole(*given, **settings)

    setattr(kind, name, measure)  # the class of this rank's process, which ends with the test
    for clips in (True, True, False):
        run.backward(0)
        if clips:
            run.clip(0.1)
        run.optimizer.step()
        run.optimizer.zero_grad()
        counts.append(0)
    return counts[:-1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_measures_its_norm_once(stage: int) -> None:
    assert run_ranks(norms_measured, 2, stage) == [[1, 1, 1]] * 2


def backward_after_clipping(stage: int) -> str:
    run = Run(Accelerator(deepspeed_plugin=plugin(stage)))
    run.backward(0)
    run.clip(1.0)
    with pytest.raises(ConfigError, match="clipped") as refused:
        run.backward(1)
    return str(refused.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_nothing_can_be_added_once_gradients_were_clipped(stage: int) -> None:
    assert all("Clip after the last backward" in message for message in run_ranks(backward_after_clipping, 2, stage))


# A whole run, saved and resumed


def epochs(accelerator: Accelerator, folder: str | None, stop: int | None) -> dict[str, Any]:
    """Two epochs over 22 rows in windows of 3, which no epoch divides; saved after step `stop`, or resumed."""
    model = seeded(Branches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    rows = torch.randn(44, 8, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(list(rows), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    prepared: Any = accelerator.prepare(model, optimizer, loader, scheduler)
    model, optimizer, loader, scheduler = prepared
    if folder is not None and stop is None:
        accelerator.load_state(folder)
    losses, norms = [], []
    for _ in range(loader.epoch, 2):
        for data in loader:
            with accelerator.accumulate(model):
                each = (model(data) - 1).pow(2).mean(dim=1)
                accelerator.backward(each.sum(), num_items=len(each))
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(each.detach().mean(), "mean").item())
            if accelerator.sync_gradients:
                norms.append(norm.item())
            if folder is not None and len(losses) == stop:
                accelerator.save_state(folder)
    weights = accelerator.strategy.full_state(model)
    return {
        "losses": losses, "norms": norms, "lr": optimizer.param_groups[0]["lr"],
        "weights": {name: value.clone() for name, value in weights.items()},
    }  # fmt: skip


def run_of(stage: int | None, device: str, precision: str, folder: str | None, stop: int | None) -> dict[str, Any]:
    settings: Any = {} if stage is None else {"deepspeed_plugin": plugin(stage, device)}
    accelerator = Accelerator(gradient_accumulation_steps=3, mixed_precision=precision, **settings)
    assert accelerator.num_processes == WORLD
    return epochs(accelerator, folder, stop)


@pytest.mark.parametrize(("stage", "device"), [(0, "none"), *OFFLOADED])
def test_a_run_equals_ddp_and_goes_on_from_its_checkpoint(stage: int, device: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    reference = run_ranks(run_of, WORLD, None, "none", "no", None, None)[0]
    whole = run_ranks(run_of, WORLD, stage, device, "no", folder, 9)[0]
    rest = run_ranks(run_of, WORLD, stage, device, "no", folder, None)[0]
    assert whole["losses"] == pytest.approx(reference["losses"], abs=1e-6)
    assert whole["norms"] == pytest.approx(reference["norms"], abs=1e-6)
    assert whole["lr"] == reference["lr"]
    assert rest["losses"] == whole["losses"][9:]
    for name, value in whole["weights"].items():
        assert torch.equal(rest["weights"][name], value), name


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (2, "bf16"), (3, "bf16")])
def test_sixteen_bits_with_weights_in_float32(stage: int, precision: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    reference = run_ranks(run_of, WORLD, None, "none", precision, None, None)[0]
    whole = run_ranks(run_of, WORLD, stage, "none", precision, folder, 9)[0]
    rest = run_ranks(run_of, WORLD, stage, "none", precision, folder, None)[0]
    assert whole["losses"] == pytest.approx(reference["losses"], abs=0.02)  # autocast rounds at other places
    assert whole["weights"]["first.weight"].dtype is torch.bfloat16
    assert rest["losses"] == whole["losses"][9:]


@pytest.mark.parametrize(("before", "after"), [(3, None), (None, 2), (1, 3)])
def test_checkpoints_are_read_by_other_strategies(before: int | None, after: int | None, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    whole = run_ranks(run_of, WORLD, before, "none", "no", folder, 9)[0]
    rest = run_ranks(run_of, WORLD, after, "none", "no", folder, None)[0]
    assert rest["losses"] == pytest.approx(whole["losses"][9:], abs=1e-6)


# Files for others, and blocks computed again


def exported(stage: int, folder: str) -> tuple[dict[str, Any], list[float]]:
    accelerator = Accelerator(deepspeed_plugin=plugin(stage))
    inner: Any = seeded(Branches)
    checkpoint_activations(inner, [("first", inner.first), ("second", inner.second)])
    optimizer: Any = torch.optim.SGD(inner.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(inner, optimizer)
    losses = []
    for number in range(2):
        loss = loss_of(model, number, accelerator.process_index)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_model(model, folder, max_shard_size=300)
    weights = accelerator.strategy.full_state(model)
    return {name: value.clone() for name, value in weights.items()}, losses


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_written_for_others(stage: int, tmp_path: Path) -> None:
    weights, losses = run_ranks(exported, WORLD, stage, str(tmp_path))[0]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == weights.keys()
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / file)[name], weights[name])
    reference = Run(None)
    assert losses[0] == pytest.approx(loss_of(reference.model, 0, 0).item(), abs=1e-6)
    for number in range(2):
        reference.backward(number)
        reference.optimizer.step()
        reference.optimizer.zero_grad()
    for name, value in reference.weights().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


# Optimizers and schedules of a configuration


def placeholders(stage: int) -> list[float]:
    config = {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": "auto", "warmup_num_steps": "auto",
                       "total_num_steps": "auto", "warmup_type": "linear"},
        },
    }  # fmt: skip
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), gradient_accumulation_steps=2)
    model = seeded(Branches)
    optimizer = DummyOptim(model.parameters(), lr=0.1, weight_decay=0.01)
    scheduler = DummyScheduler(optimizer, total_num_steps=8, warmup_num_steps=4)
    prepared: Any = accelerator.prepare(model, optimizer, scheduler)
    model, optimizer, scheduler = prepared
    rates = []
    for number in range(12):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, number, accelerator.process_index))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
    return rates


def test_a_schedule_of_the_configuration_steps_once_a_step_taken() -> None:
    rates = run_ranks(placeholders, 2, 2)[0]
    assert rates[1::2] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.075, 0.05], abs=0.026)
    assert rates[0::2][1:] == rates[1::2][:-1]  # nothing moves inside a window


def schedule_of_torch(way: str) -> list[float]:
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, hf_ds_config=config))
    model = seeded(Branches)
    optimizer: Any = DummyOptim(model.parameters())
    if way != "remedy":
        unread = LinearLR(optimizer, 1.0, 0.5, total_iters=4)
        given = [model, optimizer, unread]
        if way == "later":
            accelerator.prepare(*given[:2])
            del given[:2]
        with pytest.raises(ConfigError, match=r"LinearLR was made for a `DummyOptim`.*lr_scheduler_callable=lambda"):
            accelerator.prepare(*given)
        return []
    schedule = DummyScheduler(optimizer, lr_scheduler_callable=lambda real: LinearLR(real, 1.0, 0.5, total_iters=4))
    prepared: Any = accelerator.prepare(model, optimizer, schedule)
    model, optimizer, schedule = prepared
    rates = []
    for number in range(4):
        accelerator.backward(loss_of(model, number, accelerator.process_index))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("way", ["joint", "later", "remedy"])
def test_a_schedule_of_a_placeholder_is_refused_with_one_that_has_an_effect(way: str) -> None:
    rates = run_ranks(schedule_of_torch, 2, way)[0]
    assert rates == pytest.approx([0.0875, 0.075, 0.0625, 0.05] if way == "remedy" else [])


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.count = 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.count])  # made anew each time

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.count = int(state)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(inputs)
        return found


def counted(stage: int, folder: str) -> tuple[list[int], bool]:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage), project_dir=folder)
    raw: Any = nn.Sequential(Counting(), Counting())
    prepared: Any = accelerator.prepare(raw, torch.optim.AdamW(raw.parameters()))
    raw[0].count, raw[1].count = 7, 8
    accelerator.save_state()
    raw[0].count = raw[1].count = 0
    accelerator.load_state()
    whole = accelerator.get_state_dict(prepared[0])
    return [each.count for each in raw], not whole or whole["1._extra_state"].tolist() == [8]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_modules_keep_besides_tensors_comes_back(stage: int, tmp_path: Path) -> None:
    assert run_ranks(counted, 2, stage, str(tmp_path)) == [([7, 8], True)] * 2


# Float16


def overflowing() -> tuple[list[bool], list[float], list[float]]:
    config = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    assert accelerator.mixed_precision == "fp16"
    model = seeded(Branches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=4)
    prepared: Any = accelerator.prepare(model, optimizer, scheduler)
    model, optimizer, scheduler = prepared
    skipped, scales, rates = [], [], []
    for number in range(4):
        loss = loss_of(model, number, accelerator.process_index)
        accelerator.backward(loss * (float("inf") if number == 1 and accelerator.process_index == 1 else 1.0))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
        strategy: Any = accelerator.strategy
        scales.append(strategy._only.engine.optimizer.loss_scale)
        rates.append(scheduler.get_last_lr()[0])
    return skipped, scales, rates


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="DeepSpeed trains in float16 on accelerators only")
def test_a_step_with_infinite_gradients_is_skipped_and_counted_nowhere() -> None:
    for skipped, scales, rates in run_ranks(overflowing, 2):
        assert skipped == [False, True, False, False]
        assert scales == [16.0, 8.0, 8.0, 8.0]
        assert rates[1] == rates[0]


def float16() -> str:
    accelerator = Accelerator(deepspeed_plugin=plugin(2), mixed_precision="fp16")
    with pytest.raises(ConfigError, match="float16") as refused:
        Run(accelerator)
    return str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator that float16 can be trained on")
def test_float16_is_refused_where_deepspeed_has_it_not() -> None:
    assert "Use 'bf16'" in run_ranks(float16, 1)[0]
