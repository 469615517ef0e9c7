"""accel."""

from __future__ import annotations

from accel._version import __version__

__all__ = ["__version__"]
