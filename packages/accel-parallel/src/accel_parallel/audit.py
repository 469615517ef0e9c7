"""What ``prepare`` refuses before the first step, because it would go wrong without a word later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import nn
from torch.optim import Optimizer

from accel_parallel.sharded import is_sharded
from accel_state.errors import ConfigError

__all__ = ["audit_model", "audit_optimizer", "is_spread"]


_WRAPPERS = {
    "DataParallel": "model.module",
    "DistributedDataParallel": "model.module",
    "FullyShardedDataParallel": "the model as it was before it was wrapped",
    "FSDPModule": "the model as it was before `fully_shard`",
    "DeepSpeedEngine": "the model as it was before `deepspeed.initialize`",
}
"""Classes that exchange gradients by themselves, and what to pass instead. Known by name: their modules are slow to
import, and most are not there."""


def audit_model(
    model: nn.Module,
    *,
    name: str,
    prepared: Iterable[nn.Module],
    meta_is_filled: bool = False,
    is_exchanged: bool = False,
    may_be_spread: bool = False,
) -> None:
    """Refuse a model that is prepared already or holds parameters or buffers without data.

    Args:
        model: about to be prepared.
        name: what to call it.
        prepared: all models that are prepared, as they were given and as they were handed back.
        meta_is_filled: whether the strategy gives values to what is on the meta device.
        may_be_spread: whether a device map may have spread it, so that its weights come where they are needed.
        is_exchanged: whether gradients are averaged over ranks, so that a parameter must belong to one model.

    Raises:
        ConfigError: naming the model and the tensor.
    """
    prepared = tuple(prepared)
    for other in prepared:
        if other is model:
            raise ConfigError(
                f"{name} ({type(model).__name__}) is prepared already; wrapping it again would average its gradients "
                f"twice. Call `prepare` once a model, and use what it returned."
            )
    _refuse_wrapped(model, name)
    if type(model).__name__ == "PipelinedModel":
        raise ConfigError(
            f"{name} was divided by `prepare_pippy`, for inference, and other ranks hold the rest of it. Call it as it "
            f"is; to train, prepare the model instead of dividing it."
        )
    if is_spread(model):
        if may_be_spread:
            return
        raise ConfigError(
            f"{name} ({type(model).__name__}) is spread over devices or offloaded by a device map, which is how one "
            f"process computes it, and several are to divide the work of this one. Launch one process, or load the "
            f"model whole and let the strategy divide it."
        )
    if is_exchanged:
        _refuse_shared(model, name, prepared)
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta and not meta_is_filled:
            raise ConfigError(
                f"`{key}` of {name} ({type(model).__name__}) is on the meta device: it has a shape and no values. "
                f"Load its weights first, for example with `load_state_dict(..., assign=True)`."
            )


def is_spread(model: nn.Module) -> bool:
    """Whether a device map says where the parts of `model` are, and they are not all in one place.

    Known by what every library that does so leaves: the map itself as an attribute.
    """
    if getattr(model, "hf_device_map", None) is None:
        return False
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    is_offloaded = any(getattr(parameter, "is_offloaded", False) for parameter in parameters)
    return len(devices) > 1 or is_offloaded or torch.device("meta") in devices


def _refuse_wrapped(model: nn.Module, name: str) -> None:
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.partition(".")[0] in ("torch", "deepspeed"):
                path = path.removesuffix("_orig_mod").rstrip(".")  # the model itself, inside what torch.compile made
                raise ConfigError(
                    f"{name} {f'holds, as `{path}`,' if path else 'is'} a {kind.__name__} already, of this script or "
                    f"of another Accelerator; wrapping it again would average its gradients twice. "
                    f"Pass {_WRAPPERS[kind.__name__]}."
                )


def _refuse_shared(model: nn.Module, name: str, prepared: Iterable[nn.Module]) -> None:
    owners = {id(parameter): other for other in prepared for parameter in other.parameters()}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) in owners:
            other = type(owners[id(parameter)]).__name__
            raise ConfigError(
                f"`{key}` of {name} ({type(model).__name__}) is a parameter of a {other} that is prepared, too: each "
                f"of the two would exchange its gradient, in backwards of their own. "
                f"Prepare one module that holds both, such as an `nn.ModuleDict`, or freeze what they share."
            )


def audit_optimizer(
    optimizer: Optimizer, *, name: str, models: Sequence[nn.Module], others: Sequence[Optimizer]
) -> None:
    """Refuse an optimizer that would step parameters of no prepared model, or those of another optimizer (B15).

    Raises:
        ConfigError: saying how many of its parameters are strangers, and the shape of the first.
    """
    known = {id(parameter) for model in models for parameter in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [parameter for parameter in parameters if id(parameter) not in known]
    if strangers:
        first = tuple(strangers[0].shape)
        raise ConfigError(
            f"{name} ({type(optimizer).__name__}) holds {len(strangers)} of {len(parameters)} parameters, the first of "
            f"shape {first}, that belong to no prepared model: their gradients would never be averaged, and the model "
            f"would never learn. {_likely_cause(strangers, parameters, models)}"
        )
    taken = {
        id(p): index for index, other in enumerate(others) for group in other.param_groups for p in group["params"]
    }
    for parameter in parameters:
        if id(parameter) in taken:
            raise ConfigError(
                f"{name} ({type(optimizer).__name__}) and prepared optimizer number {taken[id(parameter)]} both hold a "
                f"parameter of shape {tuple(parameter.shape)}; two optimizers would step it on one gradient. "
                f"Give each parameter to one optimizer."
            )


def _likely_cause(
    strangers: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], models: Sequence[nn.Module]
) -> str:
    """Why an optimizer may hold what no model has, and what to do about it."""
    held = {id(parameter) for parameter in parameters}
    shapes = Counter(tuple(parameter.shape) for parameter in strangers)
    for model in models:
        free = [(name, each) for name, each in model.named_parameters() if id(each) not in held]
        if not shapes <= Counter(tuple(each.shape) for _, each in free):
            continue
        name, twin = next((name, each) for name, each in free if each.shape == strangers[0].shape)
        alike = f"They have the shapes of parameters of the {type(model).__name__}, such as `{name}`, so"
        if is_sharded(twin) and not is_sharded(strangers[0]):
            return (
                f"{alike} the optimizer was probably made before an earlier `prepare` replaced those by their shards. "
                f"Prepare both together, in one call."
            )
        if strangers[0].is_meta:
            return (
                f"{alike} the optimizer was probably made while the model was on the meta device, before its weights "
                f"were loaded. Make the optimizer afterwards, and prepare both together."
            )
        return (
            f"{alike} the optimizer was probably made before they were replaced, as by loading with `assign=True` or "
            f"by building or copying the model anew ({_kind_of(strangers[0])} there, {_kind_of(twin)} here). Make the "
            f"optimizer afterwards, and prepare both together."
        )
    return (
        "No prepared model has parameters of their shapes, so they probably belong to another model. Make the "
        "optimizer from the parameters of the model that you prepare, and prepare both together."
    )


def _kind_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
