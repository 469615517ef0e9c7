"""accel-precision."""

from __future__ import annotations

from accel_precision._version import __version__

__all__ = ["__version__"]
