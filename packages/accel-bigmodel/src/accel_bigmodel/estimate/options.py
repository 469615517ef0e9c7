"""What an estimate is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from accel_bigmodel.estimate.optimizers import optimizer_key
from accel_bigmodel.estimate.rules import Attention
from accel_state.config import MixedPrecision, did_you_mean
from accel_state.dtypes import parse_dtype
from accel_state.errors import ConfigError

__all__ = ["EstimateOptions", "Sharding"]

Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateOptions:
    """One run of a model whose memory is to be known."""

    batch_size: int = 1
    """Samples that go through the model at once."""
    sequence_length: int | None = None
    """Tokens of each; ``None`` takes 512, or as many as the model can take if those are fewer. Ignored by models
    without tokens."""
    new_tokens: int = 0
    """Tokens that are generated after `sequence_length` of a prompt. Ignored by models that keep no cache."""
    image_size: int | None = None
    """Pixels of an image's side; ``None`` takes what the model was made for. Ignored by models without images."""
    dtype: torch.dtype | str | None = None
    """Of the weights; ``None`` leaves what the model has."""
    training: bool = True
    """Whether a training step is estimated as well."""
    optimizer: str = "adamw"
    """Name of the optimizer; see `OPTIMIZERS`."""
    mixed_precision: MixedPrecision = "no"
    """Autocast in a training step."""
    checkpointing: bool = False
    """Whether each block keeps its input only, and runs again in backward."""
    accumulation_steps: int = 1
    """Micro-batches of `batch_size` for each optimizer step."""
    keeps_outputs: bool = True
    """Whether the loop holds a batch's outputs until the next ones replace them, as one does that names them. Trainers
    that return only the loss let go of them before backward."""
    ranks: int = 1
    """Processes with one device each."""
    sharding: Sharding = "none"
    """What is divided between `ranks`: with ``zero1`` optimizer states, with ``zero2`` gradients too, with ``zero3``
    and ``fsdp`` parameters too; with ``ddp`` nothing."""
    device: Literal["cuda", "cpu"] = "cuda"
    """By the rules of which device memory is kept."""
    attention: Attention = "auto"
    """Which kernel attention takes on ``cuda``; ``"auto"`` as torch chooses. Ignored on ``cpu``."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation_steps", "ranks"):
            _check_count(name, getattr(self, name), 1)
        for name in ("sequence_length", "image_size"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        _check_count("new_tokens", self.new_tokens, 0)
        _check_choice("mixed_precision", self.mixed_precision, get_args(MixedPrecision))
        _check_choice("sharding", self.sharding, get_args(Sharding))
        _check_choice("device", self.device, ("cuda", "cpu"))
        _check_choice("attention", self.attention, get_args(Attention))
        optimizer_key(self.optimizer)
        if self.sharding == "none" and self.ranks > 1:
            raise ConfigError(
                f"`ranks={self.ranks}` was given without `sharding`, so what the ranks divide is not known. Give "
                f"`sharding`, such as 'fsdp', or 'ddp' where each holds everything."
            )
        if self.dtype is not None and not parse_dtype(self.dtype).is_floating_point:
            raise ConfigError(
                f"`dtype={self.dtype!r}` is no floating-point dtype, and models compute in those. Give one such as "
                f"'bfloat16'; what weights take in 8 or 4 bits is part of every estimate."
            )

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """`dtype`, read."""
        return None if self.dtype is None else parse_dtype(self.dtype)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"`{name}={value!r}` is not a count of at least {least}. Give an integer.")


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"`{name}={value!r}` is not known.{did_you_mean(str(value), list(known))} Use one of {', '.join(known)}."
        )
