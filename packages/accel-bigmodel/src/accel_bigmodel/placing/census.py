"""A model, or the headers of its checkpoint, counted: layers with bytes, what is tied, what is never split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel_bigmodel.placing.chain import Chain, ChainBuilder
from accel_bigmodel.stored import StoredTensor
from accel_bigmodel.tied import tensor_identity
from accel_state.blocks import find_blocks, outermost
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["census", "census_of_headers", "class_names"]

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_EMBEDDING_NAMES = re.compile(r"(^|[._])(embed\w*|wte|wpe|shared)([._]|$)")


def census(
    model: nn.Module,
    *,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    tied_parameters: Iterable[Sequence[str]] | None = None,
) -> Chain:
    """The chain of a model. Reads no values, so a model on the meta device will do.

    Args:
        model: any module.
        no_split_module_classes: classes whose modules stay whole; by default they are found, see
            `accel_state.find_blocks`. An empty list splits down to modules without parts.
        dtype: what floating-point tensors will be converted to. Default: as they are.
        special_dtypes: exceptions from that by the name of a tensor.
        tied_parameters: groups of names of tensors that will be one once the model is loaded, besides those that are
            one already, which are found.

    Raises:
        ConfigError: for a class or a tensor that the model does not have.
    """
    ties = [tuple(group) for group in tied_parameters or ()]
    if special_dtypes or ties:
        _check_names(model, special_dtypes or {}, ties)
    builder = ChainBuilder(
        dtype=dtype, special_dtypes=special_dtypes, tied_names=ties, expert_share=_expert_share(model)
    )
    _Walk(builder, _unsplit(model, no_split_module_classes)).visit(model, "")
    chain = builder.finish()
    if not chain.layers:
        raise ConfigError(
            f"The {type(model).__name__} has neither parts nor parameters, so there is nothing to place. Give a model."
        )
    return chain


@dataclass(frozen=True, slots=True)
class _Unsplit:
    """Which modules stay whole: those of some classes, or single ones."""

    classes: frozenset[str] = frozenset()
    modules: frozenset[int] = frozenset()


def _unsplit(model: nn.Module, classes: Iterable[str] | str | None) -> _Unsplit:
    present, listed = _classes_and_lists(model)
    if classes is None:
        if listed:
            return _Unsplit(classes=frozenset(listed))
        return _Unsplit(modules=frozenset(id(module) for _, module in outermost(find_blocks(model))))
    wanted = [classes] if isinstance(classes, str) else list(classes)
    known = {name for each in present for name in class_names(each)}
    for name in wanted:
        # A library's list names classes for all variants of a model, and one variant need not have them all.
        if name not in known | listed:
            raise ConfigError(
                f"`no_split_module_classes` names {name!r}, but no module of the {type(model).__name__} has that "
                f"class.{did_you_mean(str(name), sorted(known))} Give classes of its modules, or leave them out to "
                f"have them found."
            )
    return _Unsplit(classes=frozenset(wanted))


def _classes_and_lists(model: nn.Module) -> tuple[set[type[nn.Module]], set[str]]:
    """Classes of all modules, and the names that these list as not to be split."""
    present: set[type[nn.Module]] = set()
    listed: set[str] = set()
    left, seen = [model], {id(model)}
    while left:
        module = left.pop()
        present.add(type(module))
        # Asked of the instance's own dictionary and below of its class: modules look for what they lack for long.
        listed.update(module.__dict__.get("_no_split_modules") or ())
        for part in module._modules.values():
            if part is not None and id(part) not in seen:
                seen.add(id(part))
                left.append(part)
    for kind in present:
        listed.update(getattr(kind, "_no_split_modules", None) or ())
    return present, listed


def class_names(kind: type[nn.Module]) -> list[str]:
    """Names of a class and of those it derives from, up to modules at large."""
    line = kind.__mro__
    return [each.__name__ for each in line[: line.index(nn.Module)]]


def census_of_headers(stored: Mapping[str, StoredTensor], *, dtype: torch.dtype | str | None = None) -> Chain:
    """The chain of a checkpoint of which only names and shapes are known.

    What has one number in its name lies in one block, such as ``model.layers.3``; other tensors are grouped by the name
    of their module. Embeddings come first, then blocks by their number, then the rest. Tied tensors are as a checkpoint
    keeps them: once.

    Args:
        stored: by name, as `accel_bigmodel.stored.read_index` gives it.
        dtype: as for `census`.
    """
    groups: dict[tuple[str, bool], list[StoredTensor]] = {}
    for name, tensor in stored.items():
        block = re.match(r"(.*?\.)?(\d+)(?=\.)", name)
        key = (block[0], True) if block else (name.rpartition(".")[0] or name, False)
        groups.setdefault(key, []).append(tensor)
    builder = ChainBuilder(dtype=dtype)
    for name, is_block in sorted(groups, key=_order):
        tensors = groups[name, is_block]
        for tensor in sorted(tensors, key=lambda each: each.name):
            is_expert = ".experts." in tensor.name
            builder.add_tensor(tensor.name, tensor.name, tensor.shape, tensor.dtype, is_expert=is_expert)
        is_lookup = not is_block and bool(_EMBEDDING_NAMES.search(name))
        builder.end_layer(name, "block" if is_block else "tensors", is_block=is_block, is_lookup=is_lookup)
    return builder.finish()


def _order(key: tuple[str, bool]) -> tuple[int, tuple[tuple[int, int, str], ...]]:
    name, is_block = key
    kind = 1 if is_block else 0 if _EMBEDDING_NAMES.search(name) else 2
    return kind, tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))


class _Walk:
    """Goes through a model in the order in which its parts were defined, and hands over layers."""

    def __init__(self, builder: ChainBuilder, unsplit: _Unsplit) -> None:
        self.builder = builder
        self.unsplit = unsplit
        self.is_unsplit: dict[type[nn.Module], bool] = {}

    def visit(self, module: nn.Module, prefix: str) -> None:
        """Hand over the layers of a module."""
        kind = type(module)
        is_block = bool(prefix) and (id(module) in self.unsplit.modules or self._stays_whole(kind))
        if is_block or (prefix and not any(module._modules.values())):
            if not is_block and kind.forward is nn.Module.forward and not (module._parameters or module._buffers):
                return  # an empty list is no layer
            self._collect(module, f"{prefix}.", is_expert=False)
            self.builder.end_layer(prefix, kind.__name__, is_block=is_block, is_lookup=isinstance(module, _LOOKUPS))
            return
        dotted = f"{prefix}." if prefix else ""
        for tensors, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    self._add(dotted + name, tensor, is_buffer=is_buffer, is_expert=False)
                    self.builder.end_layer(dotted + name, "Buffer" if is_buffer else "Parameter")
        for name, part in module._modules.items():
            if part is not None:
                self.visit(part, dotted + name)

    def _stays_whole(self, kind: type[nn.Module]) -> bool:
        found = self.is_unsplit.get(kind)
        if found is None:
            called = kind.forward is not nn.Module.forward
            found = self.is_unsplit[kind] = called and not self.unsplit.classes.isdisjoint(class_names(kind))
        return found

    def _collect(self, module: nn.Module, dotted: str, *, is_expert: bool) -> None:
        for name, tensor in module._parameters.items():
            if tensor is not None:
                self._add(dotted + name, tensor, is_buffer=False, is_expert=is_expert)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                self._add(dotted + name, buffer, is_buffer=True, is_expert=is_expert)
        for name, part in module._modules.items():
            if part is not None:
                self._collect(part, f"{dotted}{name}.", is_expert=is_expert or name == "experts")

    def _add(self, name: str, tensor: torch.Tensor, *, is_buffer: bool, is_expert: bool) -> None:
        # A parameter and a buffer on one memory are two tensors; on the meta device they are two objects anyway.
        identity = id(tensor) if tensor.is_meta else (is_buffer, tensor_identity(tensor))
        self.builder.add_tensor(name, identity, tensor.shape, tensor.dtype, is_buffer=is_buffer, is_expert=is_expert)


def _check_names(model: nn.Module, special: Mapping[str, Any], ties: Sequence[Sequence[str]]) -> None:
    known = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    given = [("special_dtypes", name) for name in special]
    given += [("tied_parameters", name) for group in ties for name in group]
    present = set(known)
    for setting, name in given:
        if name not in present:
            raise ConfigError(
                f"`{setting}` names {name!r}, but the model has no parameter or buffer of that name."
                f"{did_you_mean(name, known)} Give the full name, as `model.named_parameters()` shows it."
            )


def _expert_share(model: nn.Module) -> float:
    """Part of the experts that each token visits, by the names that configurations have for it."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    visited = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    counts = (getattr(config, name, None) for name in names)
    there = next((count for count in counts if isinstance(count, int)), 0)
    if not isinstance(visited, int) or not there:
        return 1.0
    return min(1.0, visited / there)
