"""Tensors without values that a model's own code kept, as in a cache of tables: a real forward would find them."""

from __future__ import annotations

import functools
import gc
from collections import deque
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["TracingMode", "forget_fakes"]

_LOOKED_AT = 5000
"""Objects behind a cache that are looked at."""


class TracingMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode of estimates, known from anybody else's."""


def forget_fakes() -> int:
    """Empty the caches of ``functools`` that hold fakes of a trace that is over; how many others are left anywhere.

    Called when nothing of the traces is referred to any more.
    """
    gc.collect()
    left = {id(each) for each in _alive()}
    if not left:
        return 0
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and _reaches(each, left):
            each.cache_clear()
    gc.collect()
    return len(_alive())


def _alive() -> list[Any]:
    """Parameters left out: those of the copies that were traced, which torch lets go of later."""
    fakes = [each for each in gc.get_objects() if type(each) is FakeTensor]
    return [each for each in fakes if isinstance(each.fake_mode, TracingMode) and not isinstance(each, nn.Parameter)]


def _reaches(holder: Any, wanted: set[int]) -> bool:
    seen = {id(holder)}
    left = deque([holder])
    while left and len(seen) < _LOOKED_AT:
        for each in gc.get_referents(left.popleft()):
            if id(each) in wanted:
                return True
            if id(each) not in seen and not isinstance(each, (type, ModuleType, FunctionType)):
                seen.add(id(each))
                left.append(each)
    return False
