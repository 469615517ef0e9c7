"""A model, or the headers of its checkpoint, counted: layers with bytes, what is tied, what is never split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from accel_bigmodel.placing.chain import Chain, ChainBuilder
from accel_bigmodel.stored import StoredTensor
from accel_bigmodel.tied import tensor_identity
from accel_state.blocks import find_blocks, outermost
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["census", "census_of_headers", "unsplit_modules"]

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
    blocks = {id(module) for _, module in unsplit_modules(model, no_split_module_classes)}
    ties = [tuple(group) for group in tied_parameters or ()]
    if special_dtypes or ties:
        _check_names(model, special_dtypes or {}, ties)
    builder = ChainBuilder(
        dtype=dtype, special_dtypes=special_dtypes, tied_names=ties, expert_share=_expert_share(model)
    )
    _visit(builder, model, "", blocks)
    chain = builder.finish()
    if not chain.layers:
        raise ConfigError(
            f"The {type(model).__name__} has neither parts nor parameters, so there is nothing to place. Give a model."
        )
    return chain


def unsplit_modules(model: nn.Module, classes: Iterable[str] | str | None) -> list[tuple[str, nn.Module]]:
    """The outermost modules that stay whole, with their names."""
    if classes is None:
        return outermost(find_blocks(model))
    wanted = [classes] if isinstance(classes, str) else list(classes)
    present = {each.__name__ for module in model.modules() for each in type(module).__mro__}
    # A library's list names classes for all variants of a model, and one variant need not have them all.
    listed = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for name in wanted:
        if name not in present | listed:
            raise ConfigError(
                f"`no_split_module_classes` names {name!r}, but no module of the {type(model).__name__} has that "
                f"class.{did_you_mean(str(name), sorted(present))} Give classes of its modules, or leave them out to "
                f"have them found."
            )
    found = [name for name in wanted if name in present and name not in _own_classes(model)]
    return outermost(find_blocks(model, classes=found)) if found else []


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


def _visit(builder: ChainBuilder, module: nn.Module, prefix: str, blocks: set[int]) -> None:
    is_block = id(module) in blocks
    parts = [(name, part) for name, part in module._modules.items() if part is not None]
    if prefix and (is_block or not parts):
        if not parts and not is_block and type(module).forward is nn.Module.forward and not _has_own_tensors(module):
            return  # an empty list is no layer
        _collect(builder, module, prefix + ".", is_expert=False)
        lookup = isinstance(module, _LOOKUPS)
        builder.end_layer(prefix, type(module).__name__, is_block=is_block, is_lookup=lookup)
        return
    dotted = f"{prefix}." if prefix else ""
    for name, tensor, is_buffer in _own_tensors(module):
        _add(builder, dotted + name, tensor, is_buffer=is_buffer, is_expert=False)
        builder.end_layer(dotted + name, "Buffer" if is_buffer else "Parameter")
    for name, part in parts:
        _visit(builder, part, dotted + name, blocks)


def _collect(builder: ChainBuilder, module: nn.Module, dotted: str, *, is_expert: bool) -> None:
    for name, tensor, is_buffer in _own_tensors(module):
        _add(builder, dotted + name, tensor, is_buffer=is_buffer, is_expert=is_expert)
    for name, part in module._modules.items():
        if part is not None:
            _collect(builder, part, f"{dotted}{name}.", is_expert=is_expert or name == "experts")


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor, bool]]:
    own: list[tuple[str, torch.Tensor, bool]] = []
    if module._parameters:
        own += [(name, each, False) for name, each in module._parameters.items() if each is not None]
    if module._buffers:
        own += [(name, each, True) for name, each in module._buffers.items() if each is not None]
    return own


def _has_own_tensors(module: nn.Module) -> bool:
    return bool(_own_tensors(module))


def _add(builder: ChainBuilder, name: str, tensor: torch.Tensor, *, is_buffer: bool, is_expert: bool) -> None:
    # A parameter and a buffer on one memory are two tensors; on the meta device they are two objects anyway.
    identity = id(tensor) if tensor.is_meta else (is_buffer, tensor_identity(tensor))
    builder.add_tensor(name, identity, tensor.shape, tensor.dtype, is_buffer=is_buffer, is_expert=is_expert)


def _own_classes(model: nn.Module) -> set[str]:
    return {each.__name__ for each in type(model).__mro__}


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
