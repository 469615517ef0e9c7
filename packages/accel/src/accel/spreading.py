"""From what a run was given to the strategy that spreads it: pure choice, then one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel.resolve import resolve
from accel_parallel.plugins import DistributedDataParallelKwargs
from accel_parallel.select import select_strategy, strategy_class
from accel_parallel.strategy import Strategy
from accel_state.config import LaunchSettings, RunConfig
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.topology import AXES, MeshShape

if TYPE_CHECKING:
    from accel_parallel.compilation import TorchDynamoPlugin
    from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
    from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
    from accel_parallel.parallelism import ParallelismConfig

__all__ = ["Asked", "asked_for", "dynamo_plugin_of", "make_strategy", "mesh_shape"]


def mesh_shape(parallelism: ParallelismConfig | None, world_size: int) -> MeshShape | None:
    """How the world is divided; ``None`` where nothing was asked for.

    Raises:
        ConfigError: if the sizes do not make this world.
    """
    if parallelism is None:
        return None
    parallelism.check_world(world_size)
    return parallelism.mesh_shape()


def dynamo_plugin_of(plugin: TorchDynamoPlugin | None, backend: str | None) -> TorchDynamoPlugin | None:
    """How models are compiled, from either way to say it; ``None`` where nothing was asked for."""
    if backend is None or backend.lower() == "no":
        return plugin
    if plugin is not None:
        raise ConfigError(
            f"`dynamo_backend={backend!r}` and a `dynamo_plugin` with `backend={plugin.backend!r}` were both given. "
            f"Give one of them."
        )
    from accel_parallel.compilation import TorchDynamoPlugin

    return TorchDynamoPlugin(backend=backend.lower())


@dataclass(frozen=True, slots=True)
class Asked:
    """What the arguments say about how models are spread."""

    strategy: str | None
    """Name of the strategy; ``None`` leaves it to the world."""
    options: Any = None
    """Of that strategy; ``None`` where none were given."""
    argument: str | None = None
    """That gave the options."""

    @property
    def named(self) -> dict[str, object]:
        """What was given, by the argument that gave it."""
        return {"strategy": self.strategy} if self.argument is None else {self.argument: self.options}

    def resolve(self, arguments: Mapping[str, Any], launch: LaunchSettings) -> RunConfig:
        """The settings of the run, of which the options may say some too.

        Args:
            arguments: settings by name as the script gave them; ``None`` means not given.
            launch: settings that the launcher passed on.

        Raises:
            ConfigError: if an argument has another value than the options, or a value cannot work.
        """
        if self.options is None or self.strategy is None:
            return resolve(arguments, launch)
        said = strategy_class(self.strategy).settings_in(self.options)
        for name, (value, source) in said.items():
            given = arguments.get(name)
            if given is not None and given != value:
                raise ConfigError(
                    f"`{name}={given!r}` was given to the Accelerator, and {source} says {value!r}. Give it in one of "
                    f"the two places, or the same in both."
                )
        return resolve(
            {**arguments, **{name: value for name, (value, _) in said.items()}},
            launch,
            sources={name: source for name, (_, source) in said.items()},
        )


def asked_for(
    strategy: str | None,
    fsdp_plugin: FullyShardedDataParallelPlugin | None,
    deepspeed_plugin: DeepSpeedPlugin | None,
    deepspeed_plugins: Mapping[str, DeepSpeedPlugin] | None,
) -> Asked:
    """What the arguments of the `Accelerator` ask for together.

    Raises:
        ConfigError: for two engines at once, or options of another strategy than the named one.
    """
    given = [
        Asked(name, options, argument)
        for name, argument, options in (
            ("fsdp", "fsdp_plugin", fsdp_plugin),
            ("deepspeed", "deepspeed_plugin", deepspeed_plugin),
            ("deepspeed", "deepspeed_plugins", deepspeed_plugins),
        )
        if options is not None
    ]
    if len(given) > 1:
        raise ConfigError(
            f"`{given[0].argument}` and `{given[1].argument}` were both given, and one engine spreads the models of a "
            f"run. Give one of them; several models with DeepSpeed share one `deepspeed_plugins`."
        )
    if not given:
        return Asked(strategy)
    (asked,) = given
    if strategy not in (None, asked.strategy):
        raise ConfigError(
            f"`{asked.argument}` was given, and it has no effect on the strategy `{strategy}` that was asked for. "
            f"Leave one of them out."
        )
    return asked


def make_strategy(
    process: Process,
    *,
    name: str | None,
    options: Any,
    place: bool,
    handlers: Mapping[type, Any],
    parallelism: ParallelismConfig | None,
    dynamo: TorchDynamoPlugin | None,
    precision: str,
) -> Strategy:
    """The strategy of a run. Every rank must call this.

    Args:
        process: the open process.
        name: of the strategy that was asked for; ``None`` leaves it to the world.
        options: for it, where there are any but a handler.
        place: whether models are moved to its device.
        handlers: options by their class.
        parallelism: as the user gave it.
        dynamo: how models are compiled, if at all.
        precision: that the run computes in.

    Raises:
        ConfigError: for options that would have no effect, or a mesh that the strategy cannot make.
    """
    shape = process.topology.shape
    name = name or select_strategy(world_size=process.topology.world_size, mesh=shape)
    made = strategy_class(name)
    _refuse_without_effect(process, made, name, handlers)
    given = handlers.get(made.options_type) if options is None else options
    settled = made.settle_options(given, process=process, parallelism=parallelism, precision=precision)
    _refuse_axes(made, name, shape)
    strategy: Strategy = made(process, place=place, options=settled, parallelism=parallelism, dynamo=dynamo)
    return strategy


def _refuse_without_effect(process: Process, made: Any, name: str, handlers: Mapping[type, Any]) -> None:
    kind = DistributedDataParallelKwargs
    if kind in handlers and made.options_type is not kind and process.topology.world_size > 1:
        raise ConfigError(
            f"`kwargs_handlers` holds a {kind.__name__}, which has no effect on the strategy `{name}` that this run "
            f"takes. Leave it out."
        )


def _refuse_axes(made: Any, name: str, shape: MeshShape) -> None:
    beyond = [axis for axis in AXES if shape.size_of(axis) > 1 and axis not in made.axes]
    if beyond:
        raise ConfigError(
            f"The strategy `{name}` cannot divide the world along {', '.join(beyond)}, as {shape} asks. "
            f"Leave these axes at 1, or choose another strategy."
        )
