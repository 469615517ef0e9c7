"""Metrics and hyperparameters as JSON that every strict reader accepts.

=====================================  =========================================================
value                                  is stored as
=====================================  =========================================================
str, bool, int, None, finite float     itself
NaN, infinity, minus infinity          the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``
array or tensor of one element         its number, by its own ``item()``
=====================================  =========================================================

and, among hyperparameters only:

=====================================  =========================================================
mapping, dataclass, ``Namespace``      an object; keys become strings
list, tuple, set                       an array; a set is sorted
enumeration member                     its value
path                                   its text
date, time                             ISO 8601
class, function                        its qualified name
larger array or tensor                 nested arrays up to 1,000 elements, else its type, dtype and shape
anything else, such as a torch dtype   ``str()`` of it
=====================================  =========================================================
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from accel_state.errors import ConfigError

__all__ = ["NOT_FINITE", "config_form", "metric_form"]

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The strings by which numbers are written that JSON has no number for."""

_LARGEST_ARRAY = 1000


def metric_form(name: str, value: Any) -> Any:
    """The JSON value of the metric `name`. A tensor on a device is waited for.

    Raises:
        ConfigError: if it is neither a scalar nor text.
    """
    plain = _scalar(value)
    if plain is not _NONE_OF_THEM:
        return plain
    if _is_array(value):
        raise ConfigError(
            f"The metric `{name}` is a {type(value).__name__} of shape {list(value.shape)}, and a line of metrics "
            f"holds single numbers. Log a reduction of it, such as its mean, or its elements under names of their own."
        )
    raise ConfigError(
        f"The metric `{name}` is a {type(value).__name__}, which is neither a number nor text. "
        f"Log a number, or `str({name})`; hyperparameters belong into the configuration of the run."
    )


def config_form(value: Any) -> Any:
    """The JSON value of a hyperparameter, whatever it is; nested ones too. Never raises for an odd type."""
    return _config_form(value, frozenset())


_NONE_OF_THEM = object()


def _scalar(value: Any) -> Any:
    """The JSON scalar that `value` is, or ``_NONE_OF_THEM``."""
    if isinstance(value, enum.Enum):
        return _scalar(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _not_finite(value)
    if _is_array(value) and math.prod(value.shape) == 1:
        return _scalar(value.item())
    return _NONE_OF_THEM


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _is_array(value: Any) -> bool:
    """Whether `value` looks like an array, tensor or array scalar. Needs none of their packages."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("item", "tolist", "shape", "dtype"))


def _config_form(value: Any, inside: frozenset[int]) -> Any:
    plain = _scalar(value)
    if plain is not _NONE_OF_THEM:
        return plain
    if id(value) in inside:
        return "(contains itself)"
    inside |= {id(value)}
    members = _members(value)
    if members is not None:
        return {_key(key): _config_form(each, inside) for key, each in members.items()}
    if isinstance(value, Set):
        return sorted((_config_form(each, inside) for each in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_config_form(each, inside) for each in value]
    return _odd_form(value, inside)


def _members(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return None


def _key(key: Any) -> str:
    plain = _scalar(key)
    return plain if isinstance(plain, str) else str(key)


def _odd_form(value: Any, inside: frozenset[int]) -> Any:
    if isinstance(value, enum.Enum):
        return _config_form(value.value, inside)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if _is_array(value):
        if math.prod(value.shape) <= _LARGEST_ARRAY:
            return _config_form(value.tolist(), inside)
        return f"{type(value).__name__} of {value.dtype}, shape {list(value.shape)}"
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)
