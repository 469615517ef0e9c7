"""Options of quantizing: what contradicts itself, or would do nothing, is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_bigmodel.quantize.options import BnbQuantizationConfig, TorchaoQuantizationConfig
from accel_state.errors import ConfigError


def test_defaults_are_those_of_the_mode() -> None:
    eight = BnbQuantizationConfig(load_in_8bit=True)
    assert (eight.llm_int8_threshold, eight.bnb_4bit_quant_type, eight.bnb_4bit_use_double_quant) == (6.0, None, None)
    four = BnbQuantizationConfig(load_in_4bit=True)
    assert (four.llm_int8_threshold, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (None, "fp4", False)
    assert TorchaoQuantizationConfig(weights="int8").group_size is None
    assert TorchaoQuantizationConfig(weights="int4").group_size == 128


def test_dtypes_are_read_by_name_and_names_kept_as_tuples() -> None:
    config = BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype="bf16", torch_dtype="float16", skip_modules=["lm_head"]
    )
    assert (config.bnb_4bit_compute_dtype, config.torch_dtype) == (torch.bfloat16, torch.float16)
    assert config.skip_modules == ("lm_head",)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, r"given neither of `load_in_8bit=True` and `load_in_4bit=True`.*exactly one"),
        ({"load_in_8bit": True, "load_in_4bit": True}, r"given both of .*exactly one"),
        ({"load_in_8bit": 1}, r"`load_in_8bit=1` is neither true nor false"),
        ({"load_in_4bit": True, "enable_offload": "yes"}, r"`enable_offload='yes'` is neither"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, r"'nf5'.*Did you mean 'nf4'.*fp4, nf4"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": 1}, r"`bnb_4bit_use_double_quant=1` is neither"),
        (
            {"load_in_4bit": True, "llm_int8_threshold": 6.0},
            r"`llm_int8_threshold=6.0` is a setting of `load_in_8bit` and would do nothing with `load_in_4bit=True`",
        ),
        (
            {"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"},
            "is a setting of `load_in_4bit` and would do nothing with `load_in_8bit=True`",
        ),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": False}, r"is a setting of `load_in_4bit`"),
        ({"load_in_8bit": True, "bnb_4bit_compute_dtype": "bf16"}, r"is a setting of `load_in_4bit`"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1}, r"`llm_int8_threshold=-1` is no magnitude"),
        ({"load_in_8bit": True, "llm_int8_threshold": float("nan")}, r"is no magnitude"),
        ({"load_in_8bit": True, "torch_dtype": "bf61"}, r"'bf61' is no dtype.*Did you mean 'bf16'"),
        ({"load_in_8bit": True, "torch_dtype": "int8"}, r"`torch_dtype='int8'` is no dtype in which.*compute"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float64}, r"no dtype in which"),
        ({"load_in_8bit": True, "skip_modules": "lm_head"}, r"`skip_modules='lm_head'` is not a list.*\['lm_head'\]"),
        ({"load_in_8bit": True, "keep_in_fp32_modules": [""]}, r"`keep_in_fp32_modules=.*is not a list of names"),
    ],
)
def test_bitsandbytes_options_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BnbQuantizationConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weights": "int9"}, r"`weights='int9'` is not a type.*Did you mean 'int"),
        ({"weights": "int8", "group_size": 0}, r"`group_size=0` is not a number of weights"),
        ({"weights": "int8", "group_size": True}, r"`group_size=True` is not a number of weights"),
        ({"weights": "int4", "group_size": 48}, r"`group_size=48`.*32, 64, 128, 256.*`weights='int8'`"),
        ({"weights": "int8", "torch_dtype": torch.int8}, r"no dtype in which"),
        ({"weights": "int8", "skip_modules": [1]}, r"is not a list of names"),
    ],
)
def test_torchao_options_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TorchaoQuantizationConfig(**settings)


@given(
    eight=st.booleans(),
    threshold=st.none() | st.floats(0, 100),
    kind=st.none() | st.sampled_from(["fp4", "nf4"]),
    double=st.none() | st.booleans(),
    compute=st.none() | st.sampled_from(["fp32", "fp16", "bf16"]),
)
def test_every_setting_belongs_to_one_mode(
    eight: bool, threshold: float | None, kind: Any, double: bool | None, compute: str | None
) -> None:
    settings: dict[str, Any] = {
        "llm_int8_threshold": threshold,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": compute,
    }
    idle = [name for name, value in settings.items() if value is not None and (name == "llm_int8_threshold") != eight]
    if idle:
        with pytest.raises(ConfigError, match=f"`{idle[0]}=.*would do nothing"):
            BnbQuantizationConfig(load_in_8bit=eight, load_in_4bit=not eight, **settings)
        return
    config = BnbQuantizationConfig(load_in_8bit=eight, load_in_4bit=not eight, **settings)
    assert dataclasses.replace(config) == config
