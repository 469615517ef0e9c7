"""accel-parallel."""

from __future__ import annotations

from accel_parallel._version import __version__

__all__ = ["__version__"]
