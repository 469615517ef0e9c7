"""Activation checkpointing: a block keeps its inputs only, and is computed again when backward needs the rest."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from accel_parallel.forwards import Forward, dress, forward_of, is_replaced, replace_forward, restore_forward
from accel_state.blocks import find_blocks, outermost
from accel_state.errors import ConfigError

__all__ = ["CACHE_ARGUMENTS", "checkpoint_activations", "is_checkpointed", "recompute_instead", "without_cache"]

_KIND = "recomputed"
_RECOMPUTED = "accel_recomputed"
"""Attribute of a forward that recomputes: what it calls, and what of that is kept."""

CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names under which blocks are handed a cache of keys and values, into which each of them writes."""


def checkpoint_activations(
    model: nn.Module,
    blocks: Iterable[tuple[str, nn.Module]] | None = None,
    *,
    save: Literal["nothing", "matmuls"] = "nothing",
) -> Callable[[], None]:
    """Let each block keep only its inputs in forward and compute the rest again in backward, in place.

    Peak memory falls from all activations to those of one block and the inputs of each, for about one more forward in
    three (Chen et al., arXiv:1604.06174). Gradients are the same bit for bit: random numbers and autocast are as they
    were the first time. It applies while a block is in training mode and gradients are on; otherwise nothing changes.
    Names, classes, ``state_dict`` and hooks stay, so it may come before or after `fully_shard`. Before
    `compile_model`, so that the compiler sees what is recomputed.

    An empty cache of keys and values, as models of transformers make unless ``use_cache=False``, is kept from the
    blocks while it applies, since recomputing would write into it again; a warning says that it stays empty.

    Args:
        model: the whole model, which is searched for checkpointing that is there already.
        blocks: as `find_blocks` gives them, which is asked by default. Blocks inside others are left alone.
        save: what to keep beside the inputs; ``"matmuls"`` keeps results of matrix products and of attention, so that
            only cheap operations are computed again. `torch.compile` decides about the others.

    Returns:
        A function that undoes it.

    Raises:
        ConfigError: if activations are checkpointed already, or there are no blocks.
    """
    if save not in ("nothing", "matmuls"):
        raise ConfigError(f"`save={save!r}` names nothing that a block could keep. Use 'nothing' or 'matmuls'.")
    _refuse_twice(model)
    found = outermost(find_blocks(model) if blocks is None else blocks)
    if not found:
        raise ConfigError(
            f"`{type(model).__name__}` was given for activation checkpointing, and no repeated blocks were found in "
            f"it. Pass `blocks`, such as `find_blocks(model, classes=['Block'])`."
        )
    made: dict[Forward, Forward] = {}
    for _, block in found:
        inner = forward_of(block)
        if inner not in made:
            made[inner] = _recomputing(inner, save)
        replace_forward(block, _KIND, made[inner], inner)

    def undo() -> None:
        for _, block in found:
            restore_forward(block, _KIND, how="Undoing activation checkpointing")

    return undo


def is_checkpointed(module: nn.Module) -> bool:
    """Whether `checkpoint_activations` was applied to this very module."""
    return is_replaced(module, _KIND)


def recompute_instead(forward: Forward, change: Callable[[Forward], Forward]) -> Forward:
    """A forward that recomputes ``change(inner)`` as `forward`, of a block that is checkpointed, does `inner`."""
    inner, save = getattr(forward, _RECOMPUTED)
    return _recomputing(change(inner), save)


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a block without the cache that it would write into.

    Raises:
        ConfigError: if there is something in the cache, which the block would miss.
    """
    kept = dict(kwargs)
    for name in CACHE_ARGUMENTS:
        cache = kept.get(name)
        if cache is None:
            continue
        length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 1
        if length:
            raise ConfigError(
                f"A block whose activations are checkpointed was given `{name}` with keys and values in it. It would "
                f"write there a second time when it is recomputed, so gradients would be wrong. Train without a "
                f"cache, or without activation checkpointing."
            )
        kept[name] = None
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"Blocks whose activations are checkpointed were given an empty `{name}`, which stays empty, since "
                f"they would fill it twice. Train with `use_cache=False`.",
                stacklevel=2,
            )
    if kept.get("use_cache"):
        kept["use_cache"] = False
    return kept


def _recomputing(inner: Forward, save: str) -> Forward:
    options: dict[str, Any] = {}  # dynamo takes no `context_fn` that does nothing
    if save == "matmuls":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _products())

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return inner(self, *args, **kwargs)
        kwargs = without_cache(kwargs)
        # One tuple and one dictionary: torch looks through its positional arguments for devices whose random numbers
        # it must put back, and would miss those of tensors passed by name.
        return checkpoint(_call, inner, self, args, kwargs, use_reentrant=False, **options)

    dress(forward, inner)
    setattr(forward, _RECOMPUTED, (inner, save))
    return forward


def _call(function: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(module, *args, **kwargs)


def _products() -> list[Any]:
    aten = torch.ops.aten
    names = (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    return [getattr(aten, name).default for name in names if hasattr(aten, name)]


def _refuse_twice(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"`{name}`" if name else "the model"
        if is_replaced(module, _KIND):
            by, remedy = "accel already does", "Ask for it once, or call the function that the first call returned"
        elif getattr(module, "gradient_checkpointing", False) is True:
            by = "the model does so itself (`gradient_checkpointing` is true)"
            remedy = "Turn it off there (`model.gradient_checkpointing_disable()`), or do not ask for it here"
        elif type(module).__name__ == "CheckpointWrapper":
            by, remedy = "torch's `checkpoint_wrapper` does so", "Leave the wrapper out, or do not ask for it here"
        else:
            continue
        raise ConfigError(
            f"Activations would be checkpointed twice: {by} in {where}, and computing a block a third time saves "
            f"nothing. {remedy}."
        )
