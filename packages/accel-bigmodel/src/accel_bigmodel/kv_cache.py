"""Bytes of the keys and values that a transformer keeps while it generates, from its configuration alone. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from accel_state.dtypes import dtype_size_bytes, parse_dtype
from accel_state.errors import ConfigError

__all__ = ["kv_cache_bytes_per_layer"]

_SLIDING = ("sliding_attention", "hybrid_sliding", "reference_sliding_attention")
_WITHOUT = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "moe", "mlp", "dummy")
"""Kinds of layers without keys and values: what a recurrent one keeps does not grow with the sequence."""


def kv_cache_bytes_per_layer(
    config: Any,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype | str = torch.bfloat16,
    encoder_length: int | None = None,
) -> list[int]:
    """Bytes of keys and values in each layer once `length` tokens went through, for each sequence of the batch.

    Keys and values count for the heads that have their own (grouped and multi-query attention), up to the window of a
    layer that has one, and once for layers that share them. Multi-head latent attention (DeepSeek-V2,
    arXiv:2405.04434, section 2.1) keeps one latent and one rotary key for all heads, as transformers 5.24 does; older
    versions keep them multiplied out, which takes more. Constant states, as of Mamba, are not counted.

    Args:
        config: of transformers, or anything with attributes of the same names. Of a composite one the part that
            generates is taken.
        batch_size: sequences; beams count each.
        length: tokens in the cache, prompt included.
        dtype: of the cache, by default bfloat16.
        encoder_length: what cross-attention looks at, in an encoder-decoder. Default: what its encoder always gives
            (``max_source_positions``, as in Whisper), else `length`. Ignored by other models.

    Returns:
        One number a layer of the decoder; zeros where the architecture generates nothing, as an encoder; an empty list
        where the configuration tells of no layers.

    Raises:
        ConfigError: if a size is not positive, or the heads of a model that generates cannot be told.
    """
    for name, value in (("batch_size", batch_size), ("length", length), ("encoder_length", encoder_length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"`{name}={value!r}` is no size that a cache could have. Give a positive integer.")
    element = dtype_size_bytes(parse_dtype(dtype))
    crosses = bool(getattr(config, "is_encoder_decoder", False))
    decoder = _decoder(config)
    num_layers = _number(decoder, "decoder_layers", "num_decoder_layers") if crosses else None
    num_layers = num_layers or _number(decoder, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 0
    if not _generates(decoder, crosses):
        return [0] * num_layers
    kinds = _kinds(decoder, num_layers)
    each = _layer_configs(decoder, num_layers)
    source = encoder_length or _number(config, "max_source_positions") or length
    sizes = []
    for kind, layer in zip(kinds, each, strict=True):
        width = _width(layer, kind, crosses) if kind not in _WITHOUT or crosses else 0
        seen = min(length, _window(layer, kind) or length)
        tokens = (0 if kind in _WITHOUT else seen) + (source if crosses else 0)
        sizes.append(math.ceil(batch_size * tokens * width * element))
    return sizes


def _decoder(config: Any) -> Any:
    """The part of a composite configuration that generates: of a model that sees, speaks or listens besides."""
    for name in ("decoder", "text_config", "llm_config", "language_config", "thinker_config"):
        part = getattr(config, name, None)
        if part is not None and _number(part, "num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            return part
        if part is not None and getattr(part, "text_config", None) is not None:
            return part.text_config
    return config


def _generates(decoder: Any, crosses: bool) -> bool:
    """Whether it keeps keys and values at all. Encoders of BERT's family say that they could, and are no decoders."""
    if crosses:
        return True
    is_encoder = getattr(decoder, "is_decoder", None) is False and hasattr(decoder, "type_vocab_size")
    return hasattr(decoder, "use_cache") and not is_encoder


def _kinds(decoder: Any, num_layers: int) -> list[str]:
    """What kind of attention each layer has."""
    named = getattr(decoder, "layer_types", None)
    if isinstance(named, Sequence) and len(named) == num_layers:
        kinds = [str(each) for each in named]
    else:
        kinds = [""] * num_layers
        if _heads(decoder) is None and not _number(decoder, "kv_lora_rank"):
            kinds = ["recurrent"] * num_layers  # such as the first versions of Mamba's configuration
    shared = _number(decoder, "num_kv_shared_layers") or 0
    return kinds[: num_layers - shared] + ["dummy"] * shared


def _layer_configs(decoder: Any, num_layers: int) -> Sequence[Any]:
    """The configuration of each layer, where they differ."""
    each = getattr(decoder, "per_layer_config", None)
    return each if isinstance(each, Sequence) and len(each) == num_layers else [decoder] * num_layers


def _window(layer: Any, kind: str) -> int | None:
    """Tokens that a layer looks back at; ``None``: all."""
    if kind in _SLIDING:
        return _number(layer, "sliding_window")
    if kind == "chunked_attention":
        return _number(layer, "attention_chunk_size")
    if kind == "" and getattr(layer, "use_sliding_window", True):
        return _number(layer, "sliding_window", "attention_chunk_size")
    return None


def _width(layer: Any, kind: str, crosses: bool) -> int:
    """Numbers that a layer keeps for each token."""
    latent, rotary = _number(layer, "kv_lora_rank"), _number(layer, "qk_rope_head_dim")
    if latent and rotary:
        indexer = _number(layer, "index_head_dim") if kind == "indexed_attention" else 0
        return latent + rotary + (indexer or 0)
    own = _number(layer, "decoder_attention_heads") if crosses else None
    heads = own or _heads(layer)
    hidden = _number(layer, "hidden_size", "n_embd", "d_model")
    head_dim = _number(layer, "head_dim", "d_kv", "kv_channels")
    if head_dim is None and hidden is not None and heads is not None:
        head_dim = hidden // heads
    if heads is None or head_dim is None:
        raise ConfigError(
            f"`{type(layer).__name__}` tells neither of `num_attention_heads` nor of `hidden_size` or `head_dim` under "
            f"any name that is known, so what its attention keeps cannot be computed. Give a configuration with these."
        )
    return 2 * (own or _kv_heads(layer, heads)) * head_dim


def _heads(layer: Any) -> int | None:
    return _number(layer, "num_attention_heads", "n_head", "n_heads", "num_heads")


def _kv_heads(layer: Any, heads: int) -> int:
    """Heads with keys and values of their own."""
    newer = getattr(layer, "new_decoder_architecture", None)
    if newer is not None:  # Falcon: its newer form has groups, but keeps them repeated for every head
        return 1 if layer.multi_query and not newer else heads
    grouped = _number(layer, "num_key_value_heads", "num_kv_heads", "n_head_kv")
    return grouped or (1 if getattr(layer, "multi_query", False) is True else heads)


def _number(config: Any, *names: str) -> int | None:
    """The first of these entries that is a positive number."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)
