"""Which layers of a model are quantized, and which of its tensors stay in float32. Reads no values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from accel_bigmodel.quantize.options import QuantizationConfig
from accel_bigmodel.tied import find_tied_parameters
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["Selection", "find_output_layers", "quantized_layers", "select_layers"]

_BACKENDS = ("bitsandbytes", "torchao")


@dataclass(frozen=True, slots=True)
class Selection:
    """What becomes of a model."""

    layers: tuple[str, ...]
    """Names of the linear layers that are quantized, each module once, in the order of the model."""
    float32: frozenset[str]
    """Names of the tensors that stay float32."""


def select_layers(model: nn.Module, config: QuantizationConfig) -> Selection:
    """Choose the layers of `model` that `config` quantizes.

    These are the modules of the class ``nn.Linear`` itself: a subclass may compute otherwise, and those inside
    ``nn.MultiheadAttention`` are read by it and never called. Left out are the output layer or what `skip_modules`
    names instead, what stays float32, and layers whose weight is tied to that of another module, since one tensor
    cannot be both quantized and an embedding.

    Raises:
        ConfigError: if a setting names nothing, or skips what would not be quantized anyway, if the model is quantized
            already, or if nothing of it is left to quantize.
    """
    _refuse_quantized(model)
    linear = {name: module for name, module in model.named_modules() if name and type(module) is nn.Linear}
    skipped = find_output_layers(model) if config.skip_modules is None else _named(model, config.skip_modules)
    if config.skip_modules is not None:
        _refuse_idle(model, config.skip_modules, linear)
    float32 = _float32(model, config)
    tied = _tied(model)
    layers = tuple(
        name
        for name in linear
        if name not in skipped and f"{name}.weight" not in float32 and f"{name}.weight" not in tied
    )
    if not layers:
        if type(model) is nn.Linear:
            raise ConfigError(
                "A single `nn.Linear` cannot be quantized by itself, as it is replaced where a model holds it. Put it "
                "into one, such as `nn.Sequential`."
            )
        held = sorted({type(module).__name__ for module in model.modules() if not module._modules})
        raise ConfigError(
            f"Nothing of the `{type(model).__name__}` can be quantized: it has {len(linear)} layers of the class "
            f"`nn.Linear`, all of them skipped or tied, and is made of {', '.join(held)}. Quantize a model with linear "
            f"layers, or take some out of `skip_modules` and `keep_in_fp32_modules`."
        )
    for name in layers:
        _refuse_hooks(name, linear[name])
    return Selection(layers, float32)


def find_output_layers(model: nn.Module) -> frozenset[str]:
    """Names of the layers that make the model's output: quantizing those costs most and saves least.

    What the model gives by ``get_output_embeddings``, and otherwise every linear layer tied to an embedding, or, with
    neither, the last module of the model if it is linear and lies in no other.
    """
    asked = getattr(model, "get_output_embeddings", None)
    output = asked() if callable(asked) else None
    modules = dict(model.named_modules())
    if isinstance(output, nn.Module):
        return frozenset(name for name, module in modules.items() if module is output)
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    tied = [name for name, each in modules.items() if isinstance(each, nn.Linear) and id(each.weight) in embeddings]
    if tied:
        return frozenset(tied)
    last = next(reversed(modules))
    return frozenset([last]) if last and "." not in last and isinstance(modules[last], nn.Linear) else frozenset()


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the modules whose weight is one of bitsandbytes or torchao."""
    return [name for name, module in model.named_modules() if _is_quantized(module)]


def _tied(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that several modules share. A module that has several names shares nothing."""
    found: set[str] = set()
    for group in find_tied_parameters(model):
        if len({id(model.get_submodule(name.rpartition(".")[0])) for name in group}) > 1:
            found.update(group)
    return frozenset(found)


def _refuse_hooks(name: str, layer: nn.Linear) -> None:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise ConfigError(
            f"{name!r} has hooks, and another layer takes its place that would not have them. Remove them first and "
            f"register them on the quantized model, or put {name!r} into `skip_modules`."
        )


def _is_quantized(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and any(each.__module__.partition(".")[0] in _BACKENDS for each in type(weight).__mro__)


def _refuse_quantized(model: nn.Module) -> None:
    already = quantized_layers(model)
    if already:
        raise ConfigError(
            f"The `{type(model).__name__}` is quantized already: {already[0]!r} and {len(already) - 1} more of its "
            f"layers have weights of bitsandbytes or torchao, and their original values are gone. Make the model anew, "
            f"as by `init_empty_weights`, and give `weights_location`."
        )


def _float32(model: nn.Module, config: QuantizationConfig) -> frozenset[str]:
    asked = config.keep_in_fp32_modules
    entries = (getattr(model, "_keep_in_fp32_modules", None) or ()) if asked is None else asked
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = [name for name, _ in tensors]
    if asked is not None:
        for entry in asked:
            if not any(matches(entry, name) for name in names):
                _refuse_unknown("keep_in_fp32_modules", entry, [name for name, _ in model.named_modules() if name])
    return frozenset(name for name in names if any(matches(entry, name) for entry in entries))


def matches(entry: str, name: str) -> bool:
    """Whether the dotted `entry` is `name` or a run of its parts: ``lm_head`` of ``model.lm_head.weight``."""
    return f".{entry}." in f".{name}."


def _named(model: nn.Module, entries: Iterable[str]) -> frozenset[str]:
    names = [name for name, _ in model.named_modules() if name]
    for entry in entries:
        if not any(matches(entry, name) for name in names):
            _refuse_unknown("skip_modules", entry, names)
    return frozenset(name for name in names if any(matches(entry, name) for entry in entries))


def _refuse_unknown(setting: str, entry: str, names: Sequence[str]) -> None:
    parts = sorted({part for name in names for part in name.split(".")})
    raise ConfigError(
        f"`{setting}` names {entry!r}, but the model has no module of that name."
        f"{did_you_mean(entry, [*names, *parts])} Give names as `model.named_modules()` shows them, or parts of them."
    )


def _refuse_idle(model: nn.Module, entries: Iterable[str], linear: dict[str, nn.Linear]) -> None:
    for entry in entries:
        if not any(matches(entry, name) for name in linear):
            module = next(each for name, each in model.named_modules() if name and matches(entry, name))
            raise ConfigError(
                f"`skip_modules` names {entry!r}, of the class `{type(module).__name__}`, which holds no layer that "
                f"would be quantized: only modules of the class `nn.Linear` are. Drop it from the list."
            )
