"""Models larger than the memory at hand: empty initialisation, tied parameters, sizes.

Names are imported when they are first used, so that importing the package does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_bigmodel._version import __version__

if TYPE_CHECKING:
    from accel_bigmodel.init import init_empty_weights as init_empty_weights
    from accel_bigmodel.init import init_on_device as init_on_device
    from accel_bigmodel.sizes import calculate_maximum_sizes as calculate_maximum_sizes
    from accel_bigmodel.sizes import compute_module_sizes as compute_module_sizes
    from accel_bigmodel.sizes import format_bytes as format_bytes
    from accel_bigmodel.sizes import named_module_tensors as named_module_tensors
    from accel_bigmodel.sizes import print_sizes as print_sizes
    from accel_bigmodel.sizes import size_table as size_table
    from accel_bigmodel.sizes import total_size_bytes as total_size_bytes
    from accel_bigmodel.tied import find_tied_parameters as find_tied_parameters
    from accel_bigmodel.tied import retie_parameters as retie_parameters

_HOME = {
    "calculate_maximum_sizes": "sizes",
    "compute_module_sizes": "sizes",
    "find_tied_parameters": "tied",
    "format_bytes": "sizes",
    "init_empty_weights": "init",
    "init_on_device": "init",
    "named_module_tensors": "sizes",
    "print_sizes": "sizes",
    "retie_parameters": "tied",
    "size_table": "sizes",
    "total_size_bytes": "sizes",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
