"""Settings in sections, such as those of a JSON file, each with where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accel_state.errors import ConfigError

__all__ = ["AUTO", "Notes", "Settings", "table"]

AUTO = "auto"
"""What a setting says that is to be filled."""


class Settings:
    """Values in nested sections, read and written by dotted key, with a source for each."""

    __slots__ = ("_sources", "_values")

    def __init__(self, values: Mapping[str, Any] | None = None, source: str = "") -> None:
        self._values: dict[str, Any] = _copied(values or {})
        self._sources: dict[str, str] = {key: source for key, _ in _leaves(self._values)}

    def copy(self) -> Settings:
        """An independent one."""
        other = Settings(self._values)
        other._sources = dict(self._sources)
        return other

    @property
    def values(self) -> dict[str, Any]:
        """All of it, as a dict of its own."""
        copied: dict[str, Any] = _copied(self._values)
        return copied

    def get(self, key: str) -> Any:
        """The value, a dict for a section; ``None`` where there is none."""
        found: Any = self._values
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                return None
            found = found[part]
        return found

    def given(self, key: str) -> Any:
        """The value, or ``None`` where there is none or it is to be filled."""
        value = self.get(key)
        return None if value == AUTO else value

    def is_auto(self, key: str) -> bool:
        """Whether the value is to be filled."""
        return bool(self.get(key) == AUTO)

    def source(self, key: str) -> str:
        """Where the value came from; of a section, its first value."""
        if key in self._sources:
            return self._sources[key]
        return next((source for name, source in self._sources.items() if name.startswith(f"{key}.")), "")

    def set(self, key: str, value: Any, source: str) -> None:
        """Write a value, making the sections that it needs."""
        *parts, last = key.split(".")
        section = self._values
        for depth, part in enumerate(parts, 1):
            section = section.setdefault(part, {})
            self._sources.pop(".".join(parts[:depth]), None)  # an empty section no longer is one
        self.remove(key)
        section[last] = held = _copied(value)
        if isinstance(held, dict) and held:
            self._sources.update({f"{key}.{name}": source for name, _ in _leaves(held)})
        else:
            self._sources[key] = source

    def remove(self, key: str) -> Any:
        """Take a value or a section out and return it; ``None`` where there is none."""
        *parts, last = key.split(".")
        section = self.get(".".join(parts)) if parts else self._values
        if not isinstance(section, dict) or last not in section:
            return None
        for name in [name for name in self._sources if name == key or name.startswith(f"{key}.")]:
            del self._sources[name]
        return section.pop(last)

    def names(self) -> list[str]:
        """Dotted keys of all values; an empty section counts as one."""
        return [key for key, _ in _leaves(self._values)]

    def rows(self) -> tuple[tuple[str, Any, str], ...]:
        """Key, value and source of each."""
        return tuple((key, value, self.source(key)) for key, value in _leaves(self._values))

    def merge(self, key: str, value: Any, source: str) -> None:
        """Write a value unless another one stands there; ``"auto"`` gives way to any other.

        Raises:
            ConfigError: for two values, with both and their sources.
        """
        present = self.get(key)
        if present is None or present == AUTO:
            self.set(key, value, source)
        elif value != AUTO and not _same(present, value):
            raise self.conflict(key, value, source)

    def conflict(self, key: str, value: Any, source: str, *, remedy: str = "") -> ConfigError:
        """An error that says what stands there and what else was asked for."""
        return ConfigError(
            f"`{key}` is {self.get(key)!r} ({self.source(key)}) and {value!r} ({source}), and one run has one value. "
            f"{remedy or 'Say it in one place, or the same in both.'}"
        )


@dataclass(slots=True)
class Notes:
    """What filling has to tell besides the settings themselves."""

    rows: list[tuple[str, Any, str]] = field(default_factory=list)
    """Settings that were taken out or left to DeepSpeed."""
    warnings: list[str] = field(default_factory=list)
    """What is worth saying aloud once."""


def table(rows: tuple[tuple[str, Any, str], ...]) -> str:
    """Key, value and source, one line each."""
    if not rows:
        return ""
    cells = [(key, repr(value), source) for key, value, source in rows]
    widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}" for key, value, source in cells)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _copied(value: Any) -> Any:
    """Dicts and lists anew; what they hold, such as a dtype or a group, as it is."""
    if isinstance(value, Mapping):
        return {name: _copied(held) for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(held) for held in value]
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same; true and 1 do not."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other)
