"""accel-bigmodel."""

from __future__ import annotations

from accel_bigmodel._version import __version__

__all__ = ["__version__"]
