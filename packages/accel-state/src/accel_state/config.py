"""Settings of a run, each with its source; and how the launcher hands them to its processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from accel_state.env import RUN_CONFIG_VARIABLE
from accel_state.errors import ConfigError

__all__ = ["LaunchSettings", "MixedPrecision", "RunConfig", "did_you_mean"]

MixedPrecision = Literal["no", "fp16", "bf16"]

_FORMAT_VERSION = 1


def did_you_mean(given: str, known: list[str]) -> str:
    """The known name nearest to `given`, as ``" Did you mean ...?"``, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(given, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Every setting that a run has, resolved. Made by `accel.resolve`, read by everybody, changed by nobody."""

    device: str | None = None
    """Device type, such as ``"cpu"`` or ``"cuda"``; ``None`` takes the machine's accelerator, else the CPU."""
    mixed_precision: MixedPrecision = "no"
    """Dtype in which the forward pass computes."""
    gradient_accumulation_steps: int = 1
    """Number of micro-batches whose gradients make one optimizer step."""
    backend: str | None = None
    """Name of the ``torch.distributed`` backend; ``None`` takes the device's own. Ignored in a world of one process."""
    timeout_s: float = 1800.0
    """Seconds that a collective waits for its peers. Ignored in a world of one process."""
    check_collectives: bool = False
    """Whether each collective first compares shapes and dtypes over all ranks, at the cost of a second exchange."""
    project_dir: str | None = None
    """Folder in which checkpoints and metrics are kept."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each value came from, by name of the setting."""

    def __post_init__(self) -> None:
        if self.mixed_precision not in get_args(MixedPrecision):
            known = list(get_args(MixedPrecision))
            raise ConfigError(
                f"`mixed_precision={self.mixed_precision!r}` ({self.source('mixed_precision')}) is not a precision "
                f"this version computes in.{did_you_mean(str(self.mixed_precision), known)} "
                f"Use one of {', '.join(known)}."
            )
        _check_count("gradient_accumulation_steps", self.gradient_accumulation_steps, self)
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)) or not self.timeout_s > 0:
            raise ConfigError(
                f"`timeout_s={self.timeout_s}` ({self.source('timeout_s')}) is no time that a collective could wait. "
                f"Give a positive number of seconds."
            )

    def source(self, name: str) -> str:
        """Where the value of a setting came from."""
        return self.sources.get(name, "default")

    def explain(self) -> str:
        """Every setting with its value and source, one line each."""
        rows = [(f.name, repr(getattr(self, f.name)), self.source(f.name)) for f in fields(self) if f.name != "sources"]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def _check_count(name: str, value: object, config: RunConfig) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"`{name}={value!r}` ({config.source(name)}) is not a count of at least one. Give a positive integer."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSettings:
    """The settings that a launcher was asked for, and the flag or file that each came from.

    They travel to the launched processes as JSON in one variable, `accel_state.env.RUN_CONFIG_VARIABLE`::

        {"version": 1, "settings": {"mixed_precision": "bf16"}, "sources": {"mixed_precision": "--mixed-precision"}}
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = sorted(set(RunConfig.__dataclass_fields__) - {"sources"})
        for name in self.values:
            if name not in known:
                raise ConfigError(
                    f"`{name}` is no setting of a run.{did_you_mean(name, known)} The settings are {', '.join(known)}."
                )

    def to_json(self) -> str:
        """The text that goes into the variable."""
        return json.dumps(
            {"version": _FORMAT_VERSION, "settings": dict(self.values), "sources": dict(self.sources)}, sort_keys=True
        )

    @classmethod
    def from_json(cls, text: str | None) -> LaunchSettings:
        """Read the variable; ``None`` gives no settings.

        Raises:
            ConfigError: if the text is not what a launcher of this version writes.
        """
        if text is None:
            return cls()
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"`{RUN_CONFIG_VARIABLE}={text}` is not JSON ({error}), and only `accel launch` should write it. "
                f"Unset it, or start with `accel launch`."
            ) from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != _FORMAT_VERSION:
            raise ConfigError(
                f"`{RUN_CONFIG_VARIABLE}` has format version {version!r}, and this accel-state reads "
                f"{_FORMAT_VERSION}: launcher and training process come from different installations. "
                f"Install both from one."
            )
        values, sources = data.get("settings", {}), data.get("sources", {})
        if not isinstance(values, dict) or not isinstance(sources, dict):
            raise ConfigError(
                f"`{RUN_CONFIG_VARIABLE}={text}` holds `settings` or `sources` that are no JSON objects, and only "
                f"`accel launch` should write it. Unset it, or start with `accel launch`."
            )
        return cls(values=values, sources=sources)
