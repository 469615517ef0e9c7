"""Sections of a configuration for the optimizer and its schedule, and what is prepared in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accel_parallel.deepspeed.config import CompletedConfig, DeepSpeedConfig, Facts, ScheduleSection
from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_state.errors import ConfigError

MODEL = nn.Linear(2, 3)


def complete(given: dict[str, Any] | None, facts: Facts, **arguments: Any) -> CompletedConfig:
    return DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=given, **arguments)).complete(facts)


def refused(message: str) -> Any:
    return pytest.raises(ConfigError, match=message)


ADAMW: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


def test_a_real_optimizer_is_taken_and_steps_on_the_host_where_states_are_offloaded() -> None:
    facts = Facts(optimizer=torch.optim.AdamW(MODEL.parameters()))
    completed = complete(None, facts)
    assert completed.values["zero_allow_untested_optimizer"] is True
    assert completed.warnings == ()
    assert "zero_force_ds_cpu_optimizer" not in completed.values
    offloaded = complete(None, facts, offload_optimizer_device="cpu")
    assert offloaded.values["zero_force_ds_cpu_optimizer"] is False
    assert "torch's `AdamW` steps on the host. To step with DeepSpeed's" in offloaded.warnings[0]
    assert offloaded.warnings[0] in offloaded.explain()
    no_compiler = Facts(optimizer=facts.optimizer, has_compiler=False)
    assert "needs a C++ compiler" in complete(None, no_compiler, offload_optimizer_device="cpu").warnings[0]
    kept = complete({"zero_allow_untested_optimizer": False}, facts)
    assert kept.values["zero_allow_untested_optimizer"] is False
    with refused("`zero_force_ds_cpu_optimizer` is true .* DeepSpeed would refuse it"):
        complete({"zero_force_ds_cpu_optimizer": True}, facts, zero_stage=2, offload_optimizer_device="cpu")


def test_one_optimizer_for_one_model() -> None:
    dummy = DummyOptim(MODEL.parameters())
    with refused("an `optimizer` section .*, and a `SGD` was prepared: two optimizers.*Prepare `DummyOptim"):
        complete(ADAMW, Facts(optimizer=torch.optim.SGD(MODEL.parameters(), lr=0.1)))
    with refused("A `DummyOptim` was prepared, .* no `optimizer` section. Add one"):
        complete(None, Facts(optimizer=dummy))
    with refused("no optimizer was prepared together with the model"):
        complete(ADAMW, Facts())
    with refused(r"`optimizer.params.lr` is 0.01 \(`hf_ds_config`\) and 0.1 \(`DummyOptim\(lr=0.1\)`\)"):
        complete(ADAMW, Facts(optimizer=DummyOptim(MODEL.parameters(), lr=0.1)))
    assert complete(ADAMW, Facts(optimizer=dummy)).values["optimizer"] == ADAMW["optimizer"]
    added = complete(ADAMW, Facts(optimizer=DummyOptim(MODEL.parameters(), weight_decay=0.1)))
    assert added.values["optimizer"]["params"] == {"lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("kind", ["AdamW", "adam", "Lamb", "Muon", "SGD", "RMSprop"])
def test_optimizers_of_deepspeed_and_of_torch_are_known(kind: str) -> None:
    complete({"optimizer": {"type": kind}}, Facts(optimizer=DummyOptim(MODEL.parameters())))


@pytest.mark.parametrize("section", [{"type": "AdmW"}, {"type": "sgd"}, {"type": "auto"}, {"params": {}}])
def test_an_optimizer_that_nobody_has_is_refused(section: dict[str, Any]) -> None:
    with refused("`optimizer.type` is .* neither an optimizer of DeepSpeed nor of torch"):
        complete({"optimizer": section}, Facts(optimizer=DummyOptim(MODEL.parameters())))


def test_without_a_compiler_torch_steps_and_this_is_said() -> None:
    dummy = DummyOptim(MODEL.parameters())
    for device_type, device, fallback in (("cpu", "none", True), ("cuda", "cpu", True), ("cuda", "none", False)):
        facts = Facts(optimizer=dummy, has_compiler=False, device_type=device_type)
        completed = complete(ADAMW, facts, zero_stage=2, offload_optimizer_device=device)
        params = completed.values["optimizer"]["params"]
        assert params == ({"lr": 0.01, "torch_adam": True, "weight_decay": 0.0} if fallback else {"lr": 0.01})
        assert [line.startswith("torch's Adam steps on the host") for line in completed.warnings] == [True] * fallback
    with refused("`optimizer.type` is 'Lion' .* no C\\+\\+ compiler, ninja and Python.h here"):
        complete({"optimizer": {"type": "Lion"}}, Facts(optimizer=dummy, has_compiler=False))
    complete({"optimizer": {"type": "Adagrad"}}, Facts(optimizer=dummy, has_compiler=False))


def warmup(**params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupLR", "params": params}}


def test_schedules_go_with_their_placeholders() -> None:
    real = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    with refused("a `scheduler` section .* no `DummyScheduler` was prepared in its place, so it would never step"):
        complete(warmup(), Facts(optimizer=real))
    with refused("has no `scheduler` section. Add one"):
        complete(None, Facts(optimizer=real, scheduler=DummyScheduler(real)))
    with refused("two schedules for one optimizer"):
        complete(warmup(), Facts(optimizer=real, scheduler=DummyScheduler(real, lr_scheduler_callable=print)))
    own = complete(None, Facts(optimizer=real, scheduler=DummyScheduler(real, lr_scheduler_callable=print)))
    assert own.scheduler is None
    open_end = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}
    with refused("`scheduler.params.total_num_steps` is 'auto' .* Pass `DummyScheduler"):
        complete(open_end, Facts(optimizer=real, scheduler=DummyScheduler(real)))
    with refused(r"`scheduler.params.warmup_num_steps` is 7 .* and 3 \(`DummyScheduler\(warmup_num_steps=3\)`"):
        complete(warmup(warmup_num_steps=7), Facts(optimizer=real, scheduler=DummyScheduler(real, warmup_num_steps=3)))


def test_a_schedule_takes_what_it_has_parameters_for() -> None:
    real = torch.optim.SGD([{"params": [MODEL.weight], "lr": 0.1}, {"params": [MODEL.bias], "lr": 0.2}])
    schedule = DummyScheduler(real, total_num_steps=10, warmup_num_steps=0, warmup_type="linear")
    facts = Facts(optimizer=real, scheduler=schedule)
    completed = complete(warmup(warmup_max_lr="auto", warmup_num_steps="auto"), facts)
    assert completed.scheduler == ScheduleSection(
        "WarmupLR", {"warmup_max_lr": [0.1, 0.2], "warmup_num_steps": 1, "warmup_type": "linear"}
    )
    assert "scheduler" not in completed.values
    assert "not used by WarmupLR" in completed.explain()
    cycle = {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0}}}
    taken = complete(cycle, Facts(optimizer=real, scheduler=DummyScheduler(real, 10, 2))).scheduler
    assert taken == ScheduleSection("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0})


def test_the_peak_of_a_warmup_is_the_rate_of_the_section() -> None:
    file = {**warmup(warmup_max_lr="auto"), **ADAMW}
    optimizer = DummyOptim([{"params": [MODEL.weight]}, {"params": [MODEL.bias], "lr": 0.5}])
    taken = complete(file, Facts(optimizer=optimizer, scheduler=DummyScheduler(optimizer))).scheduler
    assert taken is not None
    assert taken.params == {"warmup_max_lr": [0.01, 0.5]}
