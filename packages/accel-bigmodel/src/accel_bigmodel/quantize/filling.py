"""A model's tensors replaced one by one, quantized or cast."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from accel_bigmodel.loading.extra import extra_states
from accel_bigmodel.loading.fused import Part
from accel_bigmodel.loading.match import Match, match
from accel_bigmodel.loading.model_tensor import ModelTensor, put
from accel_bigmodel.loading.place import DISK
from accel_bigmodel.loading.source import Source, open_checkpoint
from accel_bigmodel.quantize.backend import Backend
from accel_bigmodel.quantize.options import QuantizationConfig
from accel_bigmodel.quantize.placement import Placement
from accel_bigmodel.stored import StoredTensor, map_tensor
from accel_state.config import did_you_mean
from accel_state.errors import CheckpointError, ConfigError

__all__ = ["Filling"]

_SHOWN = 5


class Filling:
    """Fills one model, once.

    Args:
        model: changed in place.
        backend: makes quantized layers.
        config: for the dtype of the rest.
        layers: names of those that are quantized.
        float32: names of the tensors that stay float32.
        placement: where each tensor goes.
        tensors: those of `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        config: QuantizationConfig,
        layers: Sequence[str],
        float32: frozenset[str],
        placement: Placement,
        tensors: Sequence[ModelTensor],
    ) -> None:
        self._model = model
        self._backend = backend
        self._dtype = config.torch_dtype
        self._layers = frozenset(layers)
        self._float32 = float32
        self._placement = placement
        self.left_in_files: dict[str, StoredTensor] = {}
        """What is on disk and was left where it lies, by each name of the model; there it is on the meta device."""
        # By name alone: to hold the tensors would keep all of them until the last one is replaced.
        self._names = {each.name: each.names for each in tensors}
        self._saved = [each.name for each in tensors if each.is_saved]
        self._computed = [each.name for each in tensors if not each.is_saved]
        self._empty = {each.name: None for each in tensors if each.tensor.device.type == "meta"}

    def from_model(self) -> None:
        """Quantize and cast the values that the model has.

        Raises:
            ConfigError: if it has none somewhere, or a layer cannot be quantized. Nothing is changed then.
        """
        if self._empty:
            raise ConfigError(
                f"{next(iter(self._empty))!r} and {len(self._empty) - 1} more tensors of the model are on the meta "
                f"device and have no values to quantize. Give the checkpoint they are in as `weights_location`."
            )
        for name in self._saved:
            self._check(name, self._tensor(name).dtype)
        for name in self._saved:
            self._fill(name, self._tensor(name).detach(), copy=False)
        self._move_computed()

    def from_checkpoint(self, path: Path) -> None:
        """Quantize and cast what a checkpoint holds.

        Raises:
            CheckpointError: if it does not fit the model.
            ConfigError: if a layer cannot be quantized, or was quantized to another type. The model is as it was, but
                for layers that come before one of another type.
        """
        sources = open_checkpoint(path)
        before = self._quantized_before(sources)
        taken = {name for parts in before.values() for name in parts}
        rest = {name: source for name, source in sources.items() if name not in taken}
        matched = self._match(rest, frozenset(before), path)
        found = matched.parts
        for name, parts in found.items():
            self._check(name, rest[parts[0].source].dtype)
        for layer, names in before.items():
            self._restore(layer, {name.removeprefix(f"{layer}."): _map(sources[name]) for name in names})
        for name, parts in found.items():
            if not self._stays_in_file(name, parts, rest):
                self._fill(name, self._read(name, parts, rest), copy=True)
        for each in extra_states(self._model):
            if each.name in matched.extra:
                each.module.set_extra_state(_map(rest[matched.extra[each.name]]).clone())
        self._move_computed()

    def _match(self, sources: Mapping[str, Source], before: frozenset[str], path: Path) -> Match:
        tensors = [
            ModelTensor(self._names[name], self._tensor(name), is_saved)
            for names, is_saved in ((self._saved, True), (self._computed, False))
            for name in names
            if name.removesuffix(".weight") not in before
        ]
        found = match(self._model, tensors, extra_states(self._model), sources, strict=False, path=path)
        missing = self._undeclared(found.missing, "_keys_to_ignore_on_load_missing")
        missing += [name for name in found.missing if name in self._empty and name not in missing]
        unexpected = self._undeclared(found.unexpected, "_keys_to_ignore_on_load_unexpected")
        if missing or unexpected:
            raise CheckpointError(self._misfit(path, missing, unexpected, before))
        for first, second in found.doubled:
            if not torch.equal(_map(sources[first]), _map(sources[second])):
                raise CheckpointError(
                    f"`{first}` and `{second}` are one tensor in the {type(self._model).__name__}, but `{path}` holds "
                    f"different values for them. Make the model with the two untied, or remove one from the checkpoint."
                )
        return found

    def _undeclared(self, names: Iterable[str], attribute: str) -> list[str]:
        patterns = getattr(self._model, attribute, None) or ()
        return [name for name in names if not any(re.search(each, name) for each in patterns)]

    def _misfit(self, path: Path, missing: Sequence[str], unexpected: Sequence[str], before: frozenset[str]) -> str:
        parts = []
        if missing:
            parts.append(f"{len(missing)} of the model's tensors are not in it: {_listed(missing, unexpected)}")
        if unexpected:
            parts.append(f"{len(unexpected)} of its tensors are not in the model: {_listed(unexpected, missing)}")
        remedy = "Give the checkpoint of a model with the same configuration."
        if any(name in self._computed for name in missing):
            remedy = (
                "Buffers that are not saved get their values when the model is made: make it by "
                "`init_empty_weights(include_buffers=False)`."
            )
        elif any(name.startswith(f"{layer}.") for layer in before for name in unexpected):
            remedy = "It was quantized otherwise than is asked for now: give the configuration it was quantized with."
        return f"`{path}` does not fit the {type(self._model).__name__}: {'; '.join(parts)}. {remedy}"

    def _quantized_before(self, sources: Mapping[str, Source]) -> dict[str, list[str]]:
        """For each layer whose weight is stored quantized, the stored names that belong to it."""
        found: dict[str, list[str]] = {}
        for name, source in sources.items():
            layer = name.removesuffix(".weight")
            if layer != name and layer in self._layers and not source.dtype.is_floating_point:
                found[layer] = [name]
        for name in sources:
            parts = name.split(".")
            for cut in range(1, len(parts)):
                layer = ".".join(parts[:cut])
                if layer in found and self._backend.is_part(".".join(parts[cut:])):
                    found[layer].append(name)
        return found

    def _stays_in_file(self, name: str, parts: Sequence[Part], sources: Mapping[str, Source]) -> bool:
        """Whether `name` is to be on disk and lies there as it is wanted."""
        source = sources[parts[0].source]
        plain = isinstance(source, StoredTensor) and len(parts) == 1 and not parts[0].place
        on_disk = self._placement.places[name] == DISK and name.removesuffix(".weight") not in self._layers
        if not on_disk or not plain or self._cast(name, source.dtype) != source.dtype:
            return False
        assert isinstance(source, StoredTensor)
        self.left_in_files.update(dict.fromkeys(self._names[name], source))
        return True

    def _read(self, name: str, parts: Sequence[Part], sources: Mapping[str, Source]) -> torch.Tensor:
        if not parts[0].place:
            return _map(sources[parts[0].source])
        made = torch.empty(self._tensor(name).shape, dtype=sources[parts[0].source].dtype)
        for part in parts:
            made[part.place] = _map(sources[part.source])
        return made

    def _check(self, name: str, stored: torch.dtype) -> None:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self._layers:
            return
        module = self._model.get_submodule(layer)
        assert isinstance(module, nn.Linear)
        self._backend.check_layer(layer, module, self._placement.device(name), self._cast(name, stored))

    def _cast(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if not dtype.is_floating_point:
            return dtype
        if not self._float32.isdisjoint(self._names[name]):
            return torch.float32
        return dtype if self._dtype is None else self._dtype  # type: ignore[return-value] # names were resolved

    def _fill(self, name: str, tensor: torch.Tensor, *, copy: bool) -> None:
        """Let `name` have the values of `tensor`; with `copy`, in other memory, as where that is a file."""
        device, dtype = self._placement.device(name), self._cast(name, tensor.dtype)
        layer = name.removesuffix(".weight")
        if layer != name and layer in self._layers:
            module = self._stand_in(layer, dtype)
            self._backend.fill(module, tensor.to(dtype), device)
            self._replace(layer, module)
            return
        held, made = self._tensor(name), tensor.to(device, dtype, copy=copy)
        if isinstance(held, nn.Parameter):
            made = nn.Parameter(made, requires_grad=False)
            made.__dict__.update(held.__dict__)
        put(self._model, self._names[name], made)

    def _restore(self, layer: str, parts: Mapping[str, torch.Tensor]) -> None:
        name = f"{layer}.weight"
        rest = {key: each for key, each in parts.items() if key != "weight"}
        module = self._stand_in(layer, self._dtype or torch.float32)  # type: ignore[arg-type]
        self._backend.restore(layer, module, parts["weight"], rest, self._placement.device(name))
        self._replace(layer, module)

    def _stand_in(self, layer: str, dtype: torch.dtype) -> nn.Module:
        module = self._model.get_submodule(layer)
        assert isinstance(module, nn.Linear)
        return self._backend.stand_in(module, dtype)

    def _replace(self, layer: str, module: nn.Module) -> None:
        for name in self._names[f"{layer}.weight"]:
            path, _, key = name.removesuffix(".weight").rpartition(".")
            setattr(self._model.get_submodule(path), key, module)

    def _move_computed(self) -> None:
        for name in self._computed:
            put(self._model, self._names[name], self._tensor(name).to(self._placement.device(name)))

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, key = name.rpartition(".")
        found: torch.Tensor = getattr(self._model.get_submodule(path), key)
        return found


def _map(source: Source) -> torch.Tensor:
    return map_tensor(source) if isinstance(source, StoredTensor) else source.tensor


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    shown = []
    for name in names[:_SHOWN]:
        near = did_you_mean(name, list(others)).removeprefix(" Did you mean ").removesuffix("?")
        shown.append(f"`{name}`{f' (the other side has {near})' if near else ''}")
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
