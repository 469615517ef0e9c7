from __future__ import annotations

import subprocess
import sys

import pytest

import accel_data

NAMES = [
    "BatchGroups",
    "DataLoaderConfiguration",
    "GlobalBatches",
    "PermutedOrder",
    "Position",
    "SampleError",
    "ShardedLoader",
    "__version__",
    "is_loader",
    "prepare_data_loader",
    "skip_first_batches",
]


def test_the_public_names_are_these() -> None:
    assert sorted(accel_data.__all__) == sorted(dir(accel_data)) == NAMES
    assert all(getattr(accel_data, name) is not None for name in NAMES)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'accel_data' has no attribute 'Loader'"):
        accel_data.Loader  # noqa: B018


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, accel_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
