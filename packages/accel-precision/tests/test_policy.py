"""Which precision a name and a device give, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from accel_precision import AutocastKwargs, DynamicLossScaler, GradScalerKwargs, MixedPrecision, NoScaler, precision
from accel_state.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "scaler"),
    [("bf16", torch.bfloat16, NoScaler), ("fp16", torch.float16, DynamicLossScaler)],
)
def test_a_name_gives_its_dtype_and_scaler(name: str, dtype: torch.dtype, scaler: type) -> None:
    made = precision(name, device=CPU)
    assert isinstance(made, MixedPrecision)
    assert made.name == name
    assert made.policy.compute_dtype is dtype
    assert made.policy.output_dtype is torch.float32
    assert type(made.scaler) is scaler
    assert made.scaler is made.scaler


def test_no_scales_nothing() -> None:
    made = precision("no", device=CPU)
    assert made.name == "no"
    assert type(made.scaler) is NoScaler


def test_scaler_settings_arrive() -> None:
    settings = GradScalerKwargs(init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=1)
    scaler = precision("fp16", device=CPU, scaler=settings).scaler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scales = []
    for gradient in (1.0, float("nan")):
        scaler.unscale_(optimizer, [torch.tensor([gradient])])
        scaler.step(optimizer, lambda: None)
        scaler.update()
        scales.append(scaler.state_dict()["scale"])
    assert scales == [24.0, 6.0]


def test_the_scaler_can_be_turned_off() -> None:
    made = precision("fp16", device=CPU, scaler=GradScalerKwargs(enabled=False))
    assert type(made.scaler) is NoScaler
    made.check(torch.nn.Linear(1, 1).half())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`mixed_precision='bf61'` is not a precision.*Did you mean 'bf16'\?.*no, fp16, bf16"
    ):
        precision("bf61", device=CPU)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="`device='meta'` is not a device type"):
        precision("bf16", device=torch.device("meta"))


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`mixed_precision='fp16'` was asked for.*'xla' does not compute in it.*no, bf16"
    ):
        precision("fp16", device=torch.device("xla"))


@pytest.mark.parametrize("name", ["no", "bf16"])
def test_scaler_settings_without_effect_are_refused(name: str) -> None:
    precision(name, device=CPU, scaler=GradScalerKwargs())
    with pytest.raises(ConfigError, match=rf"init_scale=2\.0.*`mixed_precision='{name}'`.*no effect. Leave it out"):
        precision(name, device=CPU, scaler=GradScalerKwargs(init_scale=2.0))


def test_autocast_settings_without_effect_are_refused() -> None:
    precision("no", device=CPU, autocast=AutocastKwargs(cache_enabled=True))
    with pytest.raises(ConfigError, match=r"cache_enabled=False.*casts nothing.*Leave it out"):
        precision("no", device=CPU, autocast=AutocastKwargs(cache_enabled=False))


def test_bf16_becomes_fp16_aloud_where_torch_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with caplog.at_level(logging.WARNING):
        made = precision("bf16", device=torch.device("cuda", 0), scaler=GradScalerKwargs(init_scale=2.0))
    assert made.name == "fp16"
    assert made.scaler.state_dict()["scale"] == 2.0
    assert "the device cuda:0 does not compute in bfloat16: computing in float16" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert precision("bf16", device=torch.device("cuda", 0)).name == "bf16"


def test_bf16_becomes_fp16_where_trying_it_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_bfloat16(*args: object, **kwargs: object) -> torch.Tensor:
        raise TypeError("no bfloat16 here")

    monkeypatch.setattr(torch, "ones", no_bfloat16)
    assert precision("bf16", device=CPU).name == "fp16"
    assert "mixed_precision='bf16' was asked for" in caplog.text


def test_bf16_that_works_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert precision("bf16", device=CPU).name == "bf16"
    assert caplog.text == ""
