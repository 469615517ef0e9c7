"""What a model of transformers is called with while its sequence is divided, and which of them can be.

Such a model makes masks and positions by itself, from what one rank sees. Here they are given to it, so that it makes
none, and what could not be right is refused. Nothing is imported from transformers: a model counts as one by its
``config``, which names an implementation of attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accel_parallel.sequence.context import gather_sequence
from accel_parallel.sequence.layout import SequenceLayout
from accel_parallel.sequence.ulysses import check_heads
from accel_state.errors import ConfigError

__all__ = ["CallAdapter", "attention_configs", "check_model"]

_CACHES = ("past_key_values", "cache", "past_key_value", "layer_past")
_SCALED_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the last position in sight, which differs from rank to rank."""


def check_model(model: nn.Module, layout: SequenceLayout, *, tp_size: int) -> None:
    """Refuse a model whose attention would not see the other ranks' tokens, or could not be divided.

    Raises:
        ConfigError: naming the setting and its value.
    """
    name = type(model).__name__
    for config in attention_configs(model):
        _check_config(config, name)
        heads = getattr(config, "num_attention_heads", None)
        if layout.kind == "ulysses" and isinstance(heads, int):
            check_heads(heads // tp_size, layout.size, what=f"`{name}`")
    if hasattr(getattr(model, "config", None), "_attn_implementation"):
        _check_positions(model, name)
    if layout.kind == "ulysses":
        for key, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                check_heads(module.num_heads, layout.size, what=f"`{key or name}`")


def attention_configs(model: nn.Module) -> Iterator[Any]:
    """Each configuration in a model that names an implementation of attention, as those of transformers do."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            yield config


def _check_positions(model: nn.Module, name: str) -> None:
    """Refuse embeddings of positions that count tokens in sight, and leave out padding, as RoBERTa's do."""
    for key, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in key and module.padding_idx is not None:
            raise ConfigError(
                f"`{name}` counts positions from {module.padding_idx + 1} on, over tokens that are no padding "
                f"(`{key}` has `padding_idx={module.padding_idx}`), and each rank sees its own tokens only. Use a "
                f"model that takes positions from 0, or prepare it without `cp_size` and `sp_size`."
            )


def _check_config(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"`{name}` has an encoder and a decoder (`is_encoder_decoder=True`), two sequences of which one attends to "
            f"the other, and one sequence is what is divided. Prepare it without `cp_size` and `sp_size`."
        )
    implementation = config._attn_implementation
    if implementation != "sdpa":
        raise ConfigError(
            f"`{name}` computes attention by `attn_implementation={implementation!r}`, and a divided sequence is put "
            f"together again inside torch's `scaled_dot_product_attention` only. Load it with "
            f'`attn_implementation="sdpa"`.'
        )
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    window = getattr(config, "sliding_window", None)
    if not hasattr(config, "layer_types") and window is not None and getattr(config, "use_sliding_window", True):
        kinds = [f"sliding_window={window}"]
    if kinds:
        raise ConfigError(
            f"`{name}` has layers of {', '.join(kinds)}, whose reach ends within the sequence; they would take the end "
            f"of a part for it. Use a model with full attention, or set `sliding_window=None` (and `layer_types` of "
            f"'full_attention') where that is what it was trained with."
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _SCALED_BY_LENGTH:
        raise ConfigError(
            f"`{name}` scales its rotary embeddings by the length in sight (`rope_type={kind!r}`), which differs from "
            f"rank to rank. Choose one that does not depend on it, such as 'linear', 'yarn' or 'llama3'."
        )


def _take_positions(model: nn.Module) -> bool:
    """Whether a model inside, to which a wrapper hands any arguments, names positions: others may drop them."""
    inside = (each for each in model.modules() if hasattr(each, "get_input_embeddings") and each is not model)
    return any("position_ids" in inspect.signature(each.forward).parameters for each in inside)


class CallAdapter:
    """Rewrites the arguments of one model's forward. Holds no state of a call."""

    def __init__(self, model: nn.Module, layout: SequenceLayout, group: dist.ProcessGroup) -> None:
        """
        Raises:
            ConfigError: for a model that takes no positions, and would count each rank's tokens from 0.
        """
        self._layout = layout
        self._group = group
        self._name = type(model).__name__
        parameters = inspect.signature(model.forward).parameters.values()
        self._positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        self._open = any(each.kind is each.VAR_KEYWORD for each in parameters)
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._accepts = {each.name for each in parameters if each.kind in named}
        self._variadic = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        if "position_ids" not in self._accepts and not (self._open and _take_positions(model)):
            raise ConfigError(
                f"`{self._name}.forward` takes no `position_ids`, so each rank would count its own tokens from 0. "
                f"Use a model that takes them."
            )
        loss_type = getattr(model, "loss_type", "")
        self._shifts = loss_type in (None, "ForCausalLM")
        calls = getattr(inspect.unwrap(model.forward), "__code__", None)
        by_default = loss_type is None and calls is not None and "loss_function" in calls.co_names  # as GPT-2
        takes_labels = self._open and "labels" in self._accepts
        self._computes_loss = takes_labels and (loss_type == "ForCausalLM" or by_default)

    def adapt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        """Every rank must call this. Arguments for the part of a sequence, and whether it ends in padding.

        Raises:
            ConfigError: for caches, labels that the model would shift, and masks of anything but padding at the end.
        """
        given = dict(kwargs)
        if not self._variadic:
            given.update(zip(self._positional, args, strict=False))
            args = ()
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if not isinstance(tokens, torch.Tensor):
            return args, given, False
        self._refuse(given)
        if self._computes_loss and given.get("labels") is None and given.get("shift_labels") is not None:
            given["labels"] = given["shift_labels"]  # asks for the loss, which is then computed from the other
        batch, length = tokens.shape[:2]
        ends_in_padding = False
        mask = given.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            ends_in_padding = self._check_padding(mask)
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            # All ones: with none at all, positions that leap would be taken for several documents.
            self._put(given, "attention_mask", tokens.new_ones((batch, length), dtype=torch.long))
        if given.get("position_ids") is None:
            places = self._layout.positions(length * self._layout.size, tokens.device)
            self._put(given, "position_ids", places.expand(batch, -1))
        if given.get("use_cache") is None:
            self._put(given, "use_cache", False)
        return args, given, ends_in_padding

    def _put(self, given: dict[str, Any], name: str, value: Any) -> None:
        if self._open or name in self._accepts:
            given[name] = value

    def _refuse(self, given: dict[str, Any]) -> None:
        cache = next((name for name in _CACHES if given.get(name) is not None), None)
        if cache is not None or given.get("use_cache"):
            what = f"`{cache}`" if cache is not None else "`use_cache=True`"
            raise ConfigError(
                f"`{self._name}` was called with {what} while its sequence is divided over {self._layout.size} ranks: "
                f"a cache would hold one rank's part and be read as the whole. Call it with `use_cache=False`, and "
                f"generate with a model that is not prepared."
            )
        if self._shifts and given.get("labels") is not None and given.get("shift_labels") is None:
            raise ConfigError(
                f"`{self._name}` was called with `labels` while its sequence is divided, and would shift them within "
                f"this rank's part, losing those at its edges. Cut the batch with `shard_sequence`, which gives "
                f"`shift_labels`."
            )

    def _check_padding(self, mask: torch.Tensor) -> bool:
        """Whether a mask over this rank's tokens, seen together with the others', has padding at its end."""
        whole = gather_sequence((mask.detach().to(torch.uint8),), self._layout, self._group, dim=1)[0].bool()
        first, last = bool((whole[:, 1:] & ~whole[:, :-1]).any()), bool(whole.all())  # alike on every rank
        if first:
            raise ConfigError(
                "`attention_mask` has padding before tokens, and a mask cannot be divided along with the sequence. Pad "
                "at the end (`padding_side='right'`), where causal attention needs no mask, or pass one of four "
                "dimensions (batch, 1, queries, all keys)."
            )
        return not last
