"""accel-launch."""

from __future__ import annotations

from accel_launch._version import __version__

__all__ = ["__version__"]
