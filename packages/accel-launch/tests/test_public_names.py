from __future__ import annotations

import subprocess
import sys

import pytest

import accel_launch


def test_public_names_are_these() -> None:
    assert accel_launch.__all__ == [
        "__version__",
        "Host",
        "LaunchOptions",
        "LaunchPlan",
        "ProcessPlan",
        "Setting",
        "WorkerError",
        "debug_launcher",
        "inspect_host",
        "notebook_launcher",
        "plan_launch",
    ]
    assert dir(accel_launch) == sorted(accel_launch.__all__)
    assert all(getattr(accel_launch, name) is not None for name in accel_launch.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'accel_launch' has no attribute 'nothing'"):
        accel_launch.nothing  # noqa: B018


def test_names_load_no_torch() -> None:
    names = "[getattr(accel_launch, name) for name in accel_launch.__all__]"
    code = f"import accel_launch, sys; {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
