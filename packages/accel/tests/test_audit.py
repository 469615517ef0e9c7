"""What `prepare` refuses and tells, and what `explain` prints of models."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError, GradScalerKwargs
from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

CPU = ProcessSettings(device="cpu")


def other_widths() -> str:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="on every rank") as caught:
        accelerator.prepare(nn.Linear(2, 2 + accelerator.process_index))
    return str(caught.value)


def test_ranks_with_other_models_are_refused() -> None:
    for message in run_ranks(other_widths, 2, settings=CPU):
        assert "`weight` of model number 1 is a trained torch.float32 of shape (2, 2) on rank 0" in message
        assert "of shape (3, 2) on rank 1" in message


def other_seeds() -> tuple[int, bool]:
    """On a rank: how many lines were logged, and whether the ranks have the same weights afterwards."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("accel_parallel.audit_ranks").addHandler(handler)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    model = accelerator.prepare(nn.Linear(2, 2))
    weights = accelerator.gather(accelerator.unwrap_model(model).weight.detach().unsqueeze(0))
    return len(records), bool((weights == weights[0]).all())


def test_forgotten_seeds_are_told_of() -> None:
    assert run_ranks(other_seeds, 2, settings=CPU) == [(1, True), (0, True)]


def share() -> str:
    accelerator = Accelerator(cpu=True)
    trunk = nn.Linear(2, 2)
    actor, critic = nn.Sequential(trunk, nn.Linear(2, 3)), nn.Sequential(trunk, nn.Linear(2, 1))
    try:
        accelerator.prepare(actor, critic)
    except ConfigError as error:
        return str(error)
    return "prepared"


def test_two_models_with_a_common_part_work_alone_and_are_refused_together() -> None:
    assert run_ranks(share, 1, settings=CPU) == ["prepared"]
    for message in run_ranks(share, 2, settings=CPU):
        assert "`0.weight` of model number 1 (Sequential) is a parameter of a Sequential that is prepared" in message


class Spare(nn.Module):
    """Half of it is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.used(inputs)
        return hidden


def unused() -> str:
    """On a rank: what the first step says."""
    accelerator = Accelerator(cpu=True)
    model = Spare()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(ConfigError, match="got no gradient") as caught:
        optimizer.step()
    return str(caught.value)


def test_parameters_without_a_gradient_are_named() -> None:
    for message in run_ranks(unused, 2, settings=CPU):
        assert "`spare.weight`, `spare.bias` of Spare got no gradient" in message


def test_a_stale_optimizer_is_told_why(alone: None) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(ConfigError, match=r"probably made before they were replaced.*Make the optimizer afterwards"):
        Accelerator(cpu=True).prepare(model, optimizer)


def test_explain_prints_the_dtypes_of_each_model(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    assert "model number" not in accelerator.explain()
    accelerator.prepare(nn.Linear(3, 2), nn.Linear(3, 2).bfloat16())
    lines = accelerator.explain().splitlines()
    first = lines.index("model number 0, Linear, as it is prepared:")
    second = lines.index("model number 1, Linear, as it is prepared:")
    assert lines[first + 2].split() == ["parameter", "float32", "yes", "2", "8", "0.00", "weight"]
    assert lines[second + 2].split() == ["parameter", "bfloat16", "yes", "2", "8", "0.00", "weight"]
    assert not any("as it was given" in line for line in lines)
    accelerator.free_memory()
    assert "model number" not in accelerator.explain()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_no_precision_changes_what_a_model_holds(precision: Any, alone: None, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: value.dtype for name, value in model.state_dict().items()}
    accelerator.prepare(model)
    assert {name: value.dtype for name, value in model.state_dict().items()} == before
    assert "changed the dtype" not in caplog.text


def test_a_strategy_that_changes_dtypes_is_told_of(alone: None, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True)
    prepare = accelerator.strategy.prepare

    def cast(bundle: Any) -> Any:
        for model in bundle.models:
            model[0].bfloat16()
        return prepare(bundle)

    accelerator.strategy.prepare = cast  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        accelerator.prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert "changed the dtype of 2 of 4 tensors of the Sequential, such as `0.weight` from torch.float32" in caplog.text
    text = accelerator.explain()
    assert "model number 0, Sequential, as it was given:" in text
    assert "model number 0, Sequential, as it is prepared:" in text


def skipped(kind: str) -> tuple[list[bool], bool, int, float]:
    """On a rank: which of three steps were skipped, if those changed weights, steps taken, and the last rate."""
    scaling = GradScalerKwargs(init_scale=64.0)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[scaling])
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer: Any = {
        "fused": torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
        "foreach": torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True),
        "single": torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False),
    }[kind]
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    seen, changed = [], False
    for step in range(3):
        before = accelerator.unwrap_model(model).weight.detach().clone()
        accelerator.backward(model(torch.ones(1, 2)).sum() * (float("inf") if step == 1 else 1.0))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append(accelerator.optimizer_step_was_skipped)
        changed |= seen[-1] and not torch.equal(before, accelerator.unwrap_model(model).weight)
    return seen, changed, optimizer.steps_taken, schedule.get_last_lr()[0]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["fused", "foreach", "single"])
def test_a_skipped_step_is_seen_however_the_optimizer_computes(kind: str, world: int) -> None:
    expected = ([False, True, False], False, 2, pytest.approx(0.1 * 0.5**2))
    assert run_ranks(skipped, world, kind, settings=CPU) == [expected] * world


def sharded_in_float16(parameters_too: bool) -> tuple[str, list[bool], int]:
    """On a rank: the refusal of float16 parameters, or which steps were skipped where rank 1 alone overflows."""
    scaling = GradScalerKwargs(init_scale=64.0)
    plugin = FullyShardedDataParallelPlugin()
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[scaling], fsdp_plugin=plugin)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if parameters_too:
        model[1].half()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        model, optimizer = accelerator.prepare(model, optimizer)
    except ConfigError as error:
        return str(error), [], 0
    seen = []
    for step in range(4):
        overflows = step == 1 and accelerator.process_index == 1
        accelerator.backward(model(torch.ones(1, 4)).sum() * (float("inf") if overflows else 1.0))
        if step == 3 and accelerator.process_index == 1:
            model[1].weight.grad.to_local().fill_(float("inf"))  # a part that rank 0 knows nothing of
        optimizer.step()
        optimizer.zero_grad()
        seen.append(accelerator.optimizer_step_was_skipped)
    return "", seen, optimizer.steps_taken


def test_float16_is_looked_after_where_models_are_sharded() -> None:
    for message, *_ in run_ranks(sharded_in_float16, 2, True, settings=CPU):
        assert "The trainable parameter `model.1.weight` (and 1 more) is float16" in message
    assert run_ranks(sharded_in_float16, 2, False, settings=CPU) == [("", [False, True, False, True], 2)] * 2
