"""``parallelism="auto"``: what is prepared says how much it needs, and the plan that fits best is chosen from that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accel.engine import Engine
from accel_parallel.strategy import Strategy
from accel_state.errors import ConfigError
from accel_state.process import Process

if TYPE_CHECKING:
    from accel_parallel.auto import AutoParallelism, Plan

__all__ = ["Spread", "as_request", "plan_run", "settle"]

Spread = Callable[..., Strategy]
"""Makes a strategy from its ``name``, ``options`` and ``parallelism``."""


def as_request(parallelism: str | AutoParallelism | None, others: Mapping[str, object]) -> AutoParallelism | None:
    """What was asked for, or ``None`` where nothing was.

    Args:
        parallelism: as the user gave it.
        others: settings that say themselves how a run is spread, by name; ``None`` where not given.

    Raises:
        ConfigError: for another word, or where something else decides already.
    """
    if parallelism is None:
        return None
    from accel_parallel.auto import AutoParallelism

    if not isinstance(parallelism, AutoParallelism) and parallelism != "auto":
        raise ConfigError(
            f"`parallelism={parallelism!r}` is not known. Use 'auto', or `AutoParallelism(...)`; sizes of your own are "
            f"given by `parallelism_config=ParallelismConfig(...)`."
        )
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(
            f"`parallelism={parallelism!r}` chooses how the run is spread, and {', '.join(f'`{n}`' for n in given)} "
            f"says it already. Leave one of them out."
        )
    return AutoParallelism() if isinstance(parallelism, str) else parallelism


def plan_run(
    request: AutoParallelism,
    *,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    loaders: Sequence[Any],
    process: Process,
    precision: str,
    accumulation_steps: int,
) -> Plan:
    """The plan for what is being prepared, the same on every rank. Every rank must call this.

    Raises:
        ConfigError: if it is not known what the model is given, or nothing fits.
    """
    from accel_parallel.auto import agreed_hardware, optimizer_cost, profile_model, select_plan

    if len(models) != 1:
        raise ConfigError(
            f"`parallelism='auto'` plans for one model, and {len(models)} are prepared first. Prepare the largest "
            f"alone first, with its optimizer and loader; or choose with `parallelism_config`."
        )
    request = _completed(request, models[0], loaders)
    assert request.batch_size is not None
    profile = profile_model(
        models[0],
        sequence_length=request.sequence_length,
        example_inputs=request.example_inputs,
        loss=request.loss,
        precision=precision,  # type: ignore[arg-type] # one of its words, by `RunConfig`
        device=process.device,
    )
    return select_plan(
        profile,
        request.hardware or agreed_hardware(process),
        world_size=process.topology.world_size,
        batch_size=request.batch_size,
        gradient_accumulation_steps=accumulation_steps,
        optimizer=optimizer_cost(optimizers[0]) if optimizers else "adamw",
        reserve=request.reserve,
        offload=request.offload,
        tensor_parallel=request.tensor_parallel,
    )


def settle(
    request: AutoParallelism,
    *,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    loaders: Sequence[Any],
    engine: Engine,
    process: Process,
    spread: Spread,
    has_loaders: bool,
) -> Plan:
    """Choose the plan, print it, and let the engine follow it. Every rank must call this, before anything is prepared.

    Args:
        request: what was asked for.
        models: about to be prepared, with what follows.
        optimizers: theirs.
        loaders: likewise.
        engine: of the run, which has prepared nothing yet.
        process: the open process, whose world is divided as the plan says.
        spread: makes the strategy.
        has_loaders: whether loaders are prepared already, each for its process alone.

    Raises:
        ConfigError: as of `plan_run`, and where loaders were prepared for another division of the data.
    """
    plan = plan_run(
        request,
        models=models,
        optimizers=optimizers,
        loaders=loaders,
        process=process,
        precision=engine.precision.name,
        accumulation_steps=engine.accumulation.num_steps,
    )
    mesh = plan.parallelism.mesh_shape()
    if has_loaders and mesh.tp > 1:
        raise ConfigError(
            f"`parallelism='auto'` chose {mesh}, where ranks share samples, and a loader was prepared before for ranks "
            f"that do not. Prepare model, optimizer and loaders in one call, or set `AutoParallelism("
            f"tensor_parallel=False)`."
        )
    if process.topology.is_main:
        print(plan.explain(), flush=True)
    if plan.strategy == "fsdp" or process.settings.mesh is not None:  # an earlier run may have divided it otherwise
        process.divide(mesh)
    if plan.strategy != "fsdp" and plan.activation_checkpointing:
        from accel_parallel.recompute import checkpoint_activations

        checkpoint_activations(models[0])
    engine.adopt(spread(name=plan.strategy, options=plan.fsdp_plugin(), parallelism=plan.parallelism))
    return plan


def _completed(request: AutoParallelism, model: nn.Module, loaders: Sequence[Any]) -> AutoParallelism:
    """What was left out, taken from the first loader."""
    loader = next((each for each in loaders if isinstance(each, DataLoader)), None)
    if request.batch_size is None:
        size = None if loader is None else loader.batch_size
        if size is None:
            raise ConfigError(
                "`parallelism='auto'` needs to know how many samples a process computes at once, and no `DataLoader` "
                "with a `batch_size` is prepared with the model. Prepare them in one call, or give "
                "`AutoParallelism(batch_size=...)`."
            )
        request = replace(request, batch_size=size)
    if request.sequence_length is not None or request.example_inputs is not None:
        return request
    batch = _first_batch(loader)
    if hasattr(getattr(model, "config", None), "vocab_size") and isinstance(batch, Mapping) and "input_ids" in batch:
        return replace(request, sequence_length=batch["input_ids"].shape[-1])
    return replace(request, example_inputs=_inputs(model, batch))


def _first_batch(loader: DataLoader[Any] | None) -> Any:
    """One batch of the loader, read past its sampler and workers, so that nothing of its order is used up."""
    dataset: Any = None if loader is None else loader.dataset
    if loader is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            "`parallelism='auto'` needs to know what the model is given, and no `DataLoader` with a dataset that is "
            "read by index is prepared with it. Give `AutoParallelism(sequence_length=...)` for a model of token ids, "
            "or `example_inputs`."
        )
    if len(dataset) == 0:
        raise ConfigError(
            "`parallelism='auto'` looks at a sample to see what the model is given, and the dataset of the loader is "
            "empty. Give it samples, or say what they are by `AutoParallelism(sequence_length=...)` or "
            "`example_inputs`."
        )
    rows = range(min(len(dataset), loader.batch_size or 1))
    return loader.collate_fn([dataset[row] for row in rows])


def _inputs(model: nn.Module, batch: Any) -> torch.Tensor | tuple[Any, ...] | dict[str, Any]:
    """What of a batch goes into forward: what it names, or else the first part."""
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        named = {name: value for name, value in batch.items() if takes_all or name in parameters}
        if named:
            return named
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor):
        return batch[0]
    raise ConfigError(
        f"`parallelism='auto'` cannot tell what of a batch ({type(batch).__name__}) goes into "
        f"{type(model).__name__}. Give `AutoParallelism(example_inputs=...)`."
    )
