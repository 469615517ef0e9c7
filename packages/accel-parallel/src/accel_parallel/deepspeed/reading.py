"""Reading a configuration from where users keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel_state.errors import ConfigError

__all__ = ["read_config"]


def read_config(config: Mapping[str, Any] | str | Path | None) -> tuple[Mapping[str, Any], str]:
    """The values and what to call their source.

    Raises:
        ConfigError: for a file that cannot be read, is no JSON object, or says something twice.
    """
    if config is None:
        return {}, "default"
    if isinstance(config, Mapping):
        return config, "`hf_ds_config`"
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"`hf_ds_config={str(config)!r}` cannot be read: {reason}. Give the path of a JSON file, or the "
            f"configuration itself as a dict."
        ) from None
    try:
        values = json.loads(text, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"`{path}` is no JSON: {error.msg} in line {error.lineno}, column {error.colno}. Correct it there."
        ) from None
    except _TwiceError as error:
        raise ConfigError(f"`{path}` says `{error}` twice in one section. Keep one of them.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"`{path}` holds a {type(values).__name__}. A configuration is an object: {{...}}.")
    return values, f"`{path}`"


class _TwiceError(Exception):
    """A name that stands twice in one JSON object."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(name)
        found[name] = value
    return found
