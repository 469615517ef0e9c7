"""accel-data."""

from __future__ import annotations

from accel_data._version import __version__

__all__ = ["__version__"]
