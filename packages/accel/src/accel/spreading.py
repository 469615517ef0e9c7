"""From what a run was given to the strategy that spreads it: pure choice, then one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from accel_parallel.plugins import DistributedDataParallelKwargs
from accel_parallel.select import select_strategy, strategy_class
from accel_parallel.strategy import Strategy
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.topology import AXES, MeshShape

if TYPE_CHECKING:
    from accel_parallel.compilation import TorchDynamoPlugin
    from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
    from accel_parallel.parallelism import ParallelismConfig

__all__ = ["dynamo_plugin_of", "make_strategy", "mesh_shape"]


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


def make_strategy(
    process: Process,
    *,
    name: str | None,
    place: bool,
    handlers: Mapping[type, Any],
    fsdp_plugin: FullyShardedDataParallelPlugin | None,
    parallelism: ParallelismConfig | None,
    dynamo: TorchDynamoPlugin | None,
    precision: str,
) -> Strategy:
    """The strategy of a run. Every rank must call this.

    Args:
        process: the open process.
        name: of the strategy that was asked for; ``None`` leaves it to what else was given.
        place: whether models are moved to its device.
        handlers: options by their class.
        fsdp_plugin: options of FSDP, which ask for it.
        parallelism: as the user gave it.
        dynamo: how models are compiled, if at all.
        precision: that the run computes in, which FSDP's own follows unless it says otherwise.

    Raises:
        ConfigError: for options that would have no effect, or a mesh that the strategy cannot make.
    """
    shape = process.topology.shape
    name = name or select_strategy(world_size=process.topology.world_size, mesh=shape, fsdp=fsdp_plugin is not None)
    made = strategy_class(name)
    sharding = _sharding_options(made)
    if fsdp_plugin is not None and sharding is None:
        raise ConfigError(
            f"`fsdp_plugin` was given, and it has no effect on the strategy `{name}` that was asked for. "
            f"Leave one of them out."
        )
    _refuse_without_effect(process, made, name, handlers)
    options = handlers.get(made.options_type)
    if sharding is not None:
        options = fsdp_plugin or sharding()
        _refuse_nothing_to_share(process, parallelism)
        if options.mixed_precision_policy is None and precision != "no":
            options = replace(options, mixed_precision_policy=precision)
        _refuse_other_precision(options, precision)
    _refuse_axes(made, name, shape)
    strategy: Strategy = made(process, place=place, options=options, parallelism=parallelism, dynamo=dynamo)
    return strategy


def _sharding_options(made: Any) -> type[FullyShardedDataParallelPlugin] | None:
    """The class of FSDP's options, where a strategy takes them. Only imported for one that can shard."""
    if "dp_shard" not in made.axes:
        return None
    from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin if made.options_type is FullyShardedDataParallelPlugin else None


def _refuse_nothing_to_share(process: Process, parallelism: ParallelismConfig | None) -> None:
    shape = process.topology.shape
    if parallelism is not None and process.topology.world_size == shape.dp_replicate > 1:
        raise ConfigError(
            f"`fsdp_plugin` shards a model over processes, and `ParallelismConfig(dp_replicate_size="
            f"{shape.dp_replicate})` gives each a whole copy. Set `dp_shard_size={shape.dp_replicate}` instead, or "
            f"leave the plugin out."
        )


def _refuse_other_precision(options: FullyShardedDataParallelPlugin, precision: str) -> None:
    """Gathering in a narrow type that the run does not compute in: float16 without loss scaling, or twice rounded."""
    from accel_parallel.fsdp.strategy import precision_policy

    computed = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(precision_policy(options).param_dtype)
    if computed == "fp16" != precision or (computed == "bf16" and precision == "fp16"):
        raise ConfigError(
            f"`mixed_precision_policy={options.mixed_precision_policy!r}` computes in {computed}, and the run's "
            f"`mixed_precision={precision!r}` decides on loss scaling and autocast. Set `mixed_precision={computed!r}` "
            f"and leave the policy out, or give it the same type."
        )


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
