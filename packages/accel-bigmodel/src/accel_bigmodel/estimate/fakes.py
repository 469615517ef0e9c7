"""Models and batches without memory that run all the same: shapes, dtypes and lifetimes are real, values are not.

Fakes say that they lie on the CPU, whatever device is estimated: a torch without CUDA ends the process where a fake on
a GPU wants a gradient, as no device guard is registered. What a GPU does otherwise is in `rules`. So an estimate is
the same on every machine, and touches no device.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["NEEDS_VALUES", "GroupedProducts", "fake_like", "fake_model", "one_sequence_each", "quiet_fakes"]

NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""What a fake tensor raises where a program goes on differently by the values of tensors."""


def fake_model(model: nn.Module, mode: FakeTensorMode, *, dtype: torch.dtype | None) -> nn.Module:
    """A copy of `model` with fake parameters and buffers; tied ones stay tied. No value is copied.

    Args:
        model: any module, with or without values; left as it is.
        mode: whose fakes they become.
        dtype: what floating-point parameters and buffers are converted to; ``None`` leaves them.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in memo:
            memo[id(tensor)] = _fake(tensor, mode, dtype)
    copied = copy.deepcopy(model, memo)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def fake_like(batch: Any, mode: FakeTensorMode, *, dtype: torch.dtype | None) -> Any:
    """`batch` with a fake in the place of each tensor, of `dtype` where it is of floating point."""
    made: dict[int, torch.Tensor] = {}  # one tensor under two names stays one

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = _fake(leaf, mode, dtype)
        return made[id(leaf)]

    return tree_map(fake, batch)


@contextmanager
def one_sequence_each() -> Iterator[None]:
    """While entered, models of transformers take it that no two sequences share a row of the batch.

    They look at the positions to find out, and where these have no values they prepare for the worst: a mask, with
    which attention takes another kernel. It is not packed as long as nobody gives positions.
    """
    module = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    original = getattr(module, name, None)
    if original is None:
        yield
        return
    setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """While entered, torch does not log what fakes raise: who asks is told."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets experts of a mixture be multiplied as fakes in any precision, as they are with values.

    torch takes bfloat16 only there (``meta_grouped_mm`` of torch 2.13, torch/_meta_registrations.py).
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not _grouped_mm() or args[0].dtype == torch.bfloat16:
            return func(*args, **given)
        first, second = args[0], args[1]
        offsets: Any = args[2] if len(args) > 2 else given.get("offs")
        rows, columns = first.size(-2), second.size(-1)
        # Groups are rows of the first, columns of the second, or what both are summed over: then each gives a matrix.
        if first.dim() == second.dim():
            shape = ((first.size(0) if first.dim() == 3 else offsets.numel()), rows, columns)
            return first.new_empty(shape, dtype=given.get("out_dtype") or first.dtype)
        return first.new_empty((rows, columns), dtype=given.get("out_dtype") or first.dtype)


def _grouped_mm() -> Any:
    """The operator; ``None`` where this torch has none."""
    return getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype | None) -> torch.Tensor:
    converted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    with mode:
        made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=converted, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)
