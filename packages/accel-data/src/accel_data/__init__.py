"""Sharded data loaders: which samples, in which order, on which rank, and from where to resume.

Names are imported when they are first used, so that importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_data._version import __version__

if TYPE_CHECKING:
    from accel_data.batches import BatchGroups as BatchGroups
    from accel_data.configuration import DataLoaderConfiguration as DataLoaderConfiguration
    from accel_data.convert import is_loader as is_loader
    from accel_data.convert import prepare_data_loader as prepare_data_loader
    from accel_data.loader import ShardedLoader as ShardedLoader
    from accel_data.order import PermutedOrder as PermutedOrder
    from accel_data.partition import GlobalBatches as GlobalBatches
    from accel_data.position import Position as Position
    from accel_data.reading import SampleError as SampleError
    from accel_data.skipping import skip_first_batches as skip_first_batches

_HOME = {
    "BatchGroups": "batches",
    "DataLoaderConfiguration": "configuration",
    "GlobalBatches": "partition",
    "PermutedOrder": "order",
    "Position": "position",
    "SampleError": "reading",
    "ShardedLoader": "loader",
    "is_loader": "convert",
    "prepare_data_loader": "convert",
    "skip_first_batches": "skipping",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
