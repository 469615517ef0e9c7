"""accel-track."""

from __future__ import annotations

from accel_track._version import __version__

__all__ = ["__version__"]
