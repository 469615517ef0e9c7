"""The public names of the package, and that importing it stays light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import accel_precision


def test_public_names() -> None:
    assert sorted(accel_precision.__all__) == [
        "AutocastKwargs",
        "DTypeRow",
        "DynamicLossScaler",
        "FullPrecision",
        "GradScalerKwargs",
        "MixedPrecision",
        "NoScaler",
        "__version__",
        "dtype_table",
        "format_dtype_table",
        "precision",
    ]
    assert set(dir(accel_precision)) == set(accel_precision.__all__)
    for name in accel_precision.__all__:
        assert getattr(accel_precision, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'accel_precision' has no attribute 'GradScaler'"):
        accel_precision.GradScaler  # noqa: B018


def test_importing_does_not_load_torch() -> None:
    code = "import sys, accel_precision; accel_precision.GradScalerKwargs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_of_the_readme_runs() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
