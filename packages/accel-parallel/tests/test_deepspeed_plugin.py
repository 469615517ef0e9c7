"""What may be said to DeepSpeed by arguments, and the placeholders for what its configuration describes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accel_parallel.deepspeed import available
from accel_parallel.deepspeed.hf_config import HfDeepSpeedConfig
from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_state.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_stage": 4}, "`zero_stage=4` is no stage of ZeRO"),
        ({"zero_stage": "2"}, "`zero_stage='2'` is no stage"),
        ({"zero_stage": True}, "`zero_stage=True` is no stage"),
        ({"gradient_accumulation_steps": 0}, "holds at least one. Give a positive integer"),
        ({"gradient_accumulation_steps": True}, "`gradient_accumulation_steps=True`"),
        ({"gradient_clipping": -1.0}, "`gradient_clipping=-1.0` is no norm"),
        ({"gradient_clipping": float("nan")}, "is no norm to clip to"),
        ({"gradient_clipping": "on"}, "`gradient_clipping='on'` is no norm"),
        ({"offload_optimizer_device": "nvm"}, "Did you mean 'nvme'"),
        ({"offload_param_device": "gpu"}, "Use one of none, cpu, nvme"),
        ({"offload_param_nvme_path": ""}, "`offload_param_nvme_path=''` is no path"),
        ({"zero3_init_flag": "false"}, "`zero3_init_flag='false'` is neither true nor false"),
        ({"zero3_save_16bit_model": 1}, "`zero3_save_16bit_model=1` is neither"),
        ({"communication_data_type": "float16"}, "Use one of fp16, bf16, fp32"),
        ({"transformer_moe_cls_names": ""}, "names no classes"),
        ({"transformer_moe_cls_names": []}, "names no classes"),
        ({"hf_ds_config": ""}, "`hf_ds_config=''` is no configuration"),
        ({"hf_ds_config": 3}, "Give a dict, or the path of a JSON file"),
    ],
)
def test_what_means_nothing_is_refused_with_the_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DeepSpeedPlugin(**given)


def test_an_unknown_argument_is_none_of_the_fields() -> None:
    with pytest.raises(TypeError, match="enable_msamp"):
        DeepSpeedPlugin(enable_msamp=True)  # type: ignore[call-arg]


def test_names_of_classes_come_in_a_list_or_between_commas() -> None:
    names = ("MixtralSparseMoeBlock", "Experts")
    for given in ("MixtralSparseMoeBlock, Experts", list(names), names):
        assert DeepSpeedPlugin(transformer_moe_cls_names=given).transformer_moe_cls_names == names


def test_an_object_around_a_dict_is_that_dict() -> None:
    held = {"zero_optimization": {"stage": 3}}
    assert DeepSpeedPlugin(hf_ds_config=SimpleNamespace(config=held)).hf_ds_config == held  # type: ignore[arg-type]
    assert DeepSpeedPlugin(hf_ds_config=Path("ds.json")).hf_ds_config == Path("ds.json")


def test_a_dummy_optimizer_has_real_groups_and_never_steps() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = DummyOptim(
        [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[1].weight}], lr=0.5, betas=(0.8, 0.9)
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.given == {"lr": 0.5, "betas": (0.8, 0.9)}
    assert [set(group) for group in optimizer.given_groups] == [{"params", "weight_decay"}, {"params"}]
    with pytest.raises(ConfigError, match=r"`step\(\)` was called on a `DummyOptim`.*Use what `accelerator.prepare"):
        optimizer.step()


def test_a_dummy_optimizer_takes_parameters_from_a_generator() -> None:
    model = nn.Linear(2, 3)
    optimizer = DummyOptim(model.parameters())
    assert optimizer.given_groups[0]["params"] == list(model.parameters())
    assert optimizer.given == {}
    optimizer.zero_grad()


@pytest.mark.parametrize("call", ["step", "get_last_lr", "state_dict"])
def test_a_dummy_schedule_does_nothing_itself(call: str) -> None:
    schedule = DummyScheduler(DummyOptim(nn.Linear(2, 3).parameters()), total_num_steps=10, warmup_num_steps=2)
    with pytest.raises(ConfigError, match=rf"`{call}\(\)` was called on a `DummyScheduler`"):
        getattr(schedule, call)()
    with pytest.raises(ConfigError, match=r"`load_state_dict\(\)`"):
        schedule.load_state_dict({})


@pytest.mark.parametrize("given", [{"total_num_steps": -1}, {"total_num_steps": 2.5}, {"warmup_num_steps": 0.1}])
def test_steps_of_a_schedule_are_counted(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is no number of optimizer steps"):
        DummyScheduler(DummyOptim(nn.Linear(2, 3).parameters()), **given)


def test_without_deepspeed_the_line_that_installs_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise available.PackageNotFoundError(name)

    monkeypatch.setattr(available, "version", nothing)
    expected = "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    with pytest.raises(ConfigError, match=f"not installed here. Install it: .*{expected}$"):
        available.require_deepspeed()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert available.install_line() == f"DS_ACCELERATOR=cpu {expected}"
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available.install_line() == expected


@pytest.mark.parametrize("found", ["0.18.9", "0.9.0+cu121"])
def test_an_older_deepspeed_is_refused_with_what_it_lacks(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "version", lambda name: found)
    monkeypatch.setattr(available, "is_installed", lambda: True)
    with pytest.raises(ConfigError, match=re.escape(f"DeepSpeed {found} is installed") + ".*0.19 or newer.*--upgrade"):
        available.require_deepspeed()


def test_a_compiler_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not available.has_compiler()


def test_what_transformers_asks_is_answered_by_dotted_keys() -> None:
    values: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "overlap_comm": False, "offload_param": {"device": "cpu"}},
        "bf16": {"enabled": True},
    }
    told = HfDeepSpeedConfig(values)
    assert (told.is_zero3(), told.is_zero2(), told.is_offload()) == (True, False, True)
    assert told.get_value("zero_optimization.offload_param.device") == "cpu"
    assert told.get_value("zero_optimization.offload_optimizer.device", "none") == "none"
    assert told.get_value("bf16.enabled.more", 1) == 1
    assert (told.is_true("bf16.enabled"), told.is_true("fp16.enabled")) == (True, False)
    assert (told.is_false("zero_optimization.overlap_comm"), told.is_false("fp16.enabled")) == (True, False)
    told.del_config_sub_tree("bf16")
    told.del_config_sub_tree("fp16.enabled")
    assert "bf16" not in told.config
    assert "bf16" in values
    with pytest.raises(ValueError, match="`bf16` is not in this configuration"):
        told.del_config_sub_tree("bf16", must_exist=True)
    told.release()
    assert not HfDeepSpeedConfig({"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}}).is_offload()
