"""Names, sizes and policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel_state import DTYPE_OF_PRECISION, ConfigError, DTypePolicy, dtype_size_bytes, parse_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("fp32", torch.float32),
        ("FP64", torch.float64),
        ("float", torch.float32),
        ("torch.int8", torch.int8),
        ("float8_e4m3fn", torch.float8_e4m3fn),
        (torch.bool, torch.bool),
    ],
)
def test_names(name: Any, dtype: torch.dtype) -> None:
    assert parse_dtype(name) is dtype


@pytest.mark.parametrize("name", ["bf17", "nn", "", "float4"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is no dtype of torch"):
        parse_dtype(name)


def test_every_dtype_of_torch_is_found_and_has_a_size() -> None:
    for name in dir(torch):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype):
            assert parse_dtype(name) is dtype
            assert 0 < dtype_size_bytes(dtype) <= 16


@pytest.mark.parametrize(
    ("name", "size"),
    [("float32", 4), ("bool", 1), ("uint4", 0.5), ("int2", 0.25), ("quint4x2", 0.5), ("complex128", 16), ("int8", 1)],
)
def test_sizes(name: str, size: float) -> None:
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    assert dtype_size_bytes(getattr(torch, name)) == size


def test_policy_takes_floating_point_only() -> None:
    assert DTypePolicy(compute_dtype=torch.bfloat16).param_dtype is None
    with pytest.raises(ConfigError, match=r"`reduce_dtype=torch\.int8` is no floating-point dtype"):
        DTypePolicy(reduce_dtype=torch.int8)
    with pytest.raises(ConfigError, match="`param_dtype='bf16'` is no floating-point dtype"):
        DTypePolicy(param_dtype="bf16")  # type: ignore[arg-type]


def test_precisions() -> None:
    assert dict(DTYPE_OF_PRECISION) == {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
