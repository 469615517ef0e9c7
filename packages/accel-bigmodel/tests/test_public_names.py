"""The public names of the package, and that importing it stays light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import accel_bigmodel


def test_public_names() -> None:
    assert sorted(accel_bigmodel.__all__) == [
        "__version__",
        "calculate_maximum_sizes",
        "compute_module_sizes",
        "find_tied_parameters",
        "format_bytes",
        "init_empty_weights",
        "init_on_device",
        "named_module_tensors",
        "print_sizes",
        "retie_parameters",
        "size_table",
        "total_size_bytes",
    ]
    assert set(dir(accel_bigmodel)) == set(accel_bigmodel.__all__)
    for name in accel_bigmodel.__all__:
        assert getattr(accel_bigmodel, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'accel_bigmodel' has no attribute 'load'"):
        accel_bigmodel.load  # noqa: B018


def test_importing_does_not_load_torch() -> None:
    code = "import sys, accel_bigmodel; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_of_the_readme_runs() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
