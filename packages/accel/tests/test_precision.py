"""Precision through `prepare`: what a forward computes in, what comes out, and what a checkpoint keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError, GradScalerKwargs
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Spy(nn.Module):
    """A layer that notes in which dtype it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.computed: list[torch.dtype] = []

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.layer(inputs)
        self.computed.append(hidden.dtype)
        return {"hidden": hidden}


def train(precision: Any) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, bool]:
    """On a rank: dtypes of the computation, the output, the parameters and the gradients, and whether it learnt."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = Spy()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    output = model(torch.ones(3, 2))["hidden"]
    accelerator.backward(output.mean())
    inner = accelerator.unwrap_model(model)
    gradient = inner.layer.weight.grad
    assert gradient is not None
    optimizer.step()
    moved = all(not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    return inner.computed[0], output.dtype, inner.layer.weight.dtype, gradient.dtype, moved


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_forward_computes_in_the_precision_and_gives_float32(world: int, precision: str) -> None:
    expected = (DTYPES[precision], torch.float32, torch.float32, torch.float32, True)
    assert run_ranks(train, world, precision, settings=ProcessSettings(device="cpu")) == [expected] * world


def test_a_block_can_be_put_under_it_too(alone: None) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    layer = nn.Linear(2, 2)
    with accelerator.autocast():
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    assert layer(torch.ones(1, 2)).dtype == torch.float32


def unwrap() -> list[torch.dtype]:
    """On a rank: what the model computes in, kept, let go, and after a copy."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    given = Spy()
    model = accelerator.prepare(given)
    twin = copy.deepcopy(model)
    twin(torch.ones(1, 2))
    kept = accelerator.unwrap_model(model)
    assert kept is given
    kept(torch.ones(1, 2))
    free = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert free is given
    free(torch.ones(1, 2))
    copied = accelerator.unwrap_model(twin) if accelerator.num_processes == 1 else twin.module
    assert copied is not given
    assert copied.layer.weight is not given.layer.weight
    return [copied.computed[-1], *given.computed]


@pytest.mark.parametrize("world", [1, 2])
def test_unwrapping_keeps_or_drops_the_precision_and_a_copy_has_it(world: int) -> None:
    expected = [torch.bfloat16, torch.bfloat16, torch.float32]
    assert run_ranks(unwrap, world, settings=ProcessSettings(device="cpu")) == [expected] * world


def test_a_copy_of_a_prepared_model_learns_by_itself(alone: None) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = Spy()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    average = copy.deepcopy(model)
    before = average.layer.weight.detach().clone()
    accelerator.backward(model(torch.ones(1, 2))["hidden"].sum())
    optimizer.step()
    assert torch.equal(average.layer.weight, before)
    assert not torch.equal(model.layer.weight, before)
    assert average(torch.ones(1, 2))["hidden"].dtype == torch.float32
    assert average.computed == [torch.bfloat16]


def test_float16_parameters_are_refused_when_they_are_prepared(alone: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).half())
    with pytest.raises(ConfigError, match=r"`model\.1\.weight` \(and 1 more\) is float16"):
        Accelerator(cpu=True, mixed_precision="fp16").prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def scaled_run(folder: str, resume: bool) -> list[float]:
    """On a rank: the loss scale after each of six steps, of which every third overflows; or of the last three."""
    accelerator = Accelerator(
        cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=64.0, growth_interval=2)]
    )
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    if resume:
        accelerator.load_state(folder)
    scales = []
    for step in range(3 if resume else 0, 6):
        accelerator.backward(model(torch.ones(1, 2)).sum() * (float("inf") if step % 3 == 2 else 1.0))
        scales.append(accelerator._engine.precision.scaler.get_scale())
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            accelerator.save_state(folder)
    return scales


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_scale_goes_on_where_it_was(world: int, tmp_path: Path) -> None:
    cpu = ProcessSettings(device="cpu")
    whole = run_ranks(scaled_run, world, str(tmp_path / "saved"), False, settings=cpu)
    assert whole == [[64.0, 64.0, 128.0, 64.0, 64.0, 128.0]] * world
    assert run_ranks(scaled_run, world, str(tmp_path / "saved"), True, settings=cpu) == [each[3:] for each in whole]


def test_what_was_asked_for_can_be_read(alone: None) -> None:
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    assert Accelerator(cpu=True).mixed_precision == "no"
