"""The options of the strategy: plugins by name, and what the run computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["DeepSpeedOptions", "named_plugins"]

Precision = Literal["no", "bf16", "fp16"]


def named_plugins(given: DeepSpeedPlugin | Mapping[str, DeepSpeedPlugin] | None) -> Mapping[str, DeepSpeedPlugin]:
    """Plugins by name; a single one is called ``"default"``.

    Raises:
        ConfigError: for something else, or no plugin at all.
    """
    if given is None or isinstance(given, DeepSpeedPlugin):
        return MappingProxyType({"default": given or DeepSpeedPlugin()})
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"`deepspeed_plugins={given!r}` names no plugins. Give a dict such as {{'student': DeepSpeedPlugin(...), "
            f"'teacher': DeepSpeedPlugin(...)}}, or one `deepspeed_plugin`."
        )
    for name, plugin in given.items():
        if not isinstance(name, str) or not isinstance(plugin, DeepSpeedPlugin):
            raise ConfigError(
                f"`deepspeed_plugins` holds {name!r}: {plugin!r}, and it maps names to `DeepSpeedPlugin`s. "
                f"Give one for each name."
            )
    if len({id(plugin) for plugin in given.values()}) < len(given):
        raise ConfigError(
            f"`deepspeed_plugins` holds one plugin under several of the names {', '.join(map(repr, given))}. Make one "
            f"for each model, so that each has a configuration of its own."
        )
    return MappingProxyType(dict(given))


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedOptions:
    """What the strategy is made with."""

    plugins: Mapping[str, DeepSpeedPlugin] = field(default_factory=lambda: named_plugins(None))
    """The first is selected until another is."""
    precision: Precision = "no"
    """What the run computes in."""
    precision_source: str = "`mixed_precision`"
    """Who says so."""

    def find(self, name: str) -> DeepSpeedPlugin:
        """The plugin of that name.

        Raises:
            ConfigError: naming those that there are.
        """
        if name not in self.plugins:
            raise ConfigError(
                f"No DeepSpeed plugin is called {name!r}.{did_you_mean(name, list(self.plugins))} "
                f"Use one of {', '.join(map(repr, self.plugins))}."
            )
        return self.plugins[name]
