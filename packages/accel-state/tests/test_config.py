"""Settings, their sources, and their way to the launched processes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_state import ConfigError, LaunchSettings, RunConfig
from accel_state.config import did_you_mean

values = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["cpu", "cuda"]),
        "mixed_precision": st.sampled_from(["no", "fp16", "bf16"]),
        "gradient_accumulation_steps": st.integers(1, 1000),
        "timeout_s": st.floats(0.1, 1e6),
        "check_collectives": st.booleans(),
        "project_dir": st.text(),
    },
)


@given(values, st.dictionaries(st.text(), st.text()))
def test_launch_settings_round_trip(settings: dict[str, object], sources: dict[str, str]) -> None:
    given_settings = LaunchSettings(values=settings, sources=sources)
    assert LaunchSettings.from_json(given_settings.to_json()) == given_settings


def test_no_variable_gives_no_settings() -> None:
    assert LaunchSettings.from_json(None) == LaunchSettings()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ('{"version": 2, "settings": {}}', "has format version 2, and this accel-state reads 1"),
        ("[]", "has format version None"),
        ('{"version": 1, "settings": []}', "no JSON objects"),
        ('{"version": 1, "settings": {"mixed_precison": "no"}}', "Did you mean 'mixed_precision'"),
    ],
)
def test_foreign_text_is_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LaunchSettings.from_json(text)


def test_format_is_stable() -> None:
    text = LaunchSettings(values={"device": "cpu"}, sources={"device": "--cpu"}).to_json()
    assert json.loads(text) == {"version": 1, "settings": {"device": "cpu"}, "sources": {"device": "--cpu"}}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mixed_precision": "bf6"}, "Did you mean 'bf16'"),
        ({"gradient_accumulation_steps": 0}, "is not a count of at least one"),
        ({"gradient_accumulation_steps": True}, "is not a count of at least one"),
        ({"gradient_accumulation_steps": 1.0}, "is not a count of at least one"),
        ({"timeout_s": 0}, "is no time that a collective could wait"),
        ({"timeout_s": float("nan")}, "is no time that a collective could wait"),
        ({"timeout_s": "30"}, "is no time that a collective could wait"),
    ],
)
def test_values_that_cannot_work_are_refused(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RunConfig(**arguments)  # type: ignore[arg-type]


def test_errors_name_the_source() -> None:
    with pytest.raises(ConfigError, match=r"`mixed_precision='fp8'` \(--mixed-precision\)"):
        RunConfig(mixed_precision="fp8", sources={"mixed_precision": "--mixed-precision"})  # type: ignore[arg-type]


def test_explain_shows_each_value_and_source() -> None:
    lines = RunConfig(device="cpu", sources={"device": "--cpu"}).explain().splitlines()
    assert lines[0].split() == ["device", "'cpu'", "--cpu"]
    assert lines[1].split() == ["mixed_precision", "'no'", "default"]
    assert len(lines) == 7


def test_did_you_mean_is_silent_without_a_near_name() -> None:
    assert did_you_mean("zzz", ["bf16"]) == ""
