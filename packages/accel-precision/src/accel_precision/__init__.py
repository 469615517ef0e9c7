"""Mixed precision: dtypes, autocast on the same module object, and loss scaling.

Names are imported when they are first used, so that importing the package does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_precision._version import __version__

if TYPE_CHECKING:
    from accel_precision.autocast import FullPrecision as FullPrecision
    from accel_precision.autocast import MixedPrecision as MixedPrecision
    from accel_precision.policy import precision as precision
    from accel_precision.scaler import DynamicLossScaler as DynamicLossScaler
    from accel_precision.scaler import NoScaler as NoScaler
    from accel_precision.settings import AutocastKwargs as AutocastKwargs
    from accel_precision.settings import GradScalerKwargs as GradScalerKwargs
    from accel_precision.table import DTypeRow as DTypeRow
    from accel_precision.table import dtype_table as dtype_table
    from accel_precision.table import format_dtype_table as format_dtype_table

_HOME = {
    "AutocastKwargs": "settings",
    "DTypeRow": "table",
    "DynamicLossScaler": "scaler",
    "FullPrecision": "autocast",
    "GradScalerKwargs": "settings",
    "MixedPrecision": "autocast",
    "NoScaler": "scaler",
    "dtype_table": "table",
    "format_dtype_table": "table",
    "precision": "policy",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
