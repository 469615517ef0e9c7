"""Where a checkpoint is, as users say it: a path of this machine, or the URL of an object store.

A URL stays text: a `Path` makes one slash of two.
"""

from __future__ import annotations

import re
from pathlib import Path

from accel_state.errors import ConfigError

__all__ = ["Location", "as_location", "child", "is_remote", "local_path"]

Location = str | Path

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_HALVED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/[^/]")
"""What a `Path` leaves of a URL. A drive has one letter."""
_LOCAL = ("file", "local")


def is_remote(location: Location) -> bool:
    """Whether it is the URL of something else than a file of this machine.

    Raises:
        ConfigError: for a URL that has been a `Path`.
    """
    if isinstance(location, Path) and (halved := _HALVED.match(str(location))):
        raise ConfigError(
            f"`{location}` was given as a `Path`, which turns the two slashes of a URL into one. Give the URL as a "
            f"string, which begins with `{halved[1]}://`."
        )
    found = _URL.fullmatch(str(location))
    return found is not None and found[1].lower() not in _LOCAL


def local_path(location: Location) -> Path:
    """The path that a location of this machine is, also as ``file:///path``."""
    found = _URL.fullmatch(str(location))
    return Path(found[2]) if found else Path(location)


def as_location(given: Location) -> Location:
    """The same with one type for each kind: text for a URL, else a path."""
    if not is_remote(given):
        return local_path(given)
    protocol, slashes, rest = str(given).partition("://")
    return protocol + slashes + rest.rstrip("/")


def child(location: Location, name: str) -> Location:
    """What is called `name` in there; text for a URL, else a path."""
    place = as_location(location)
    return f"{place}/{name}" if isinstance(place, str) else place / name
