"""Batches of the shapes that a model takes, made up from its configuration; without values."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from accel_bigmodel.estimate.options import EstimateOptions
from accel_state.errors import ConfigError

__all__ = ["made_up_batch", "sequence_length_of"]

_DEFAULT_LENGTH = 512


def made_up_batch(
    model: nn.Module, config: Any, options: EstimateOptions, *, labels: bool, more_tokens: int = 0
) -> dict[str, torch.Tensor]:
    """The arguments of a forward on the meta device, by name.

    What a model takes is told by its ``main_input_name``, as models of transformers have it, or by the parameters of
    its ``forward``: tokens (``input_ids``), images (``pixel_values``, or the only argument of a model of timm), sound
    (``input_features``). Tokens come without padding, so without an ``attention_mask``.

    Args:
        model: whose forward it is.
        config: of transformers, or ``None``.
        options: the sizes.
        labels: whether the model is asked for its loss, if it can tell one.
        more_tokens: how many were generated before; an encoder-decoder has only these in its decoder.

    Raises:
        ConfigError: if what it takes cannot be told.
    """
    accepted = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", None) or next(iter(accepted), ""))
    crosses = bool(getattr(config, "is_encoder_decoder", False))
    if main == "input_ids":
        length = sequence_length_of(config, options) + (0 if crosses else more_tokens)
        batch = {main: _tokens(options, length)}
    elif main == "pixel_values" or getattr(model, "default_cfg", None) is not None:
        batch = {main: _images(model, config, options)}
    elif main == "input_features":
        batch = {main: _sound(config, options)}
    else:
        raise ConfigError(
            f"What `{type(model).__name__}` takes cannot be told: its forward begins with {main!r}, which is neither "
            f"`input_ids`, `pixel_values` nor `input_features`. Give a batch as `inputs`; tensors on the meta device "
            f"will do."
        )
    with_labels = labels and "labels" in accepted
    if with_labels:
        batch["labels"] = _labels(model, config, options)
    if crosses and "decoder_input_ids" in accepted and not with_labels:  # labels make those by themselves
        batch["decoder_input_ids"] = _tokens(options, more_tokens or sequence_length_of(config, options))
    return batch


def sequence_length_of(config: Any, options: EstimateOptions) -> int:
    """Tokens of a sample."""
    if options.sequence_length is not None:
        return options.sequence_length
    text = getattr(config, "text_config", None) or config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_target_positions")
    most = next((value for value in (getattr(text, name, None) for name in names) if type(value) is int), None)
    return min(_DEFAULT_LENGTH, most) if most and most > 0 else _DEFAULT_LENGTH


def _tokens(options: EstimateOptions, length: int) -> torch.Tensor:
    return torch.empty((options.batch_size, length), dtype=torch.int64, device="meta")


def _images(model: nn.Module, config: Any, options: EstimateOptions) -> torch.Tensor:
    given = getattr(model, "default_cfg", None)
    known = isinstance(given, dict) and "input_size" in given
    channels, height, width = given["input_size"] if known else (3, 224, 224)  # type: ignore[index]
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)):
        height, width = size
    elif isinstance(size, int):
        height = width = size
    if options.image_size is not None:
        height = width = options.image_size
    channels = getattr(config, "num_channels", channels)
    return torch.empty((options.batch_size, channels, height, width), device="meta")


def _sound(config: Any, options: EstimateOptions) -> torch.Tensor:
    bins = getattr(config, "num_mel_bins", 80)
    frames = 2 * int(getattr(config, "max_source_positions", 1500))  # the encoder halves them
    return torch.empty((options.batch_size, bins, frames), device="meta")


def _labels(model: nn.Module, config: Any, options: EstimateOptions) -> torch.Tensor:
    name = type(model).__name__
    if "TokenClassification" in name or not name.endswith("Classification"):
        return _tokens(options, sequence_length_of(config, options))
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    shape = (options.batch_size, int(getattr(config, "num_labels", 2))) if several else (options.batch_size,)
    regression = getattr(config, "num_labels", 2) == 1
    return torch.empty(shape, dtype=torch.float32 if several or regression else torch.int64, device="meta")
