"""What users say about a run whose plan is to be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel_parallel.auto.hardware import Hardware
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["AutoParallelism"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoParallelism:
    """What ``parallelism="auto"`` finds out by itself, where it cannot, or where you know better."""

    batch_size: int | None = None
    """Samples of a micro-batch on each process that sees data of its own; ``None``: those of the loader that is
    prepared with the model."""
    sequence_length: int | None = None
    """Tokens of a sample, for models of token ids; ``None``: those of the loader's samples."""
    example_inputs: torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None
    """What forward takes, for other models: a tensor, a tuple, or keyword arguments. Only shapes and dtypes count.
    ``None``: what the loader gives."""
    loss: Callable[[Any], torch.Tensor] | None = None
    """Gives the loss from what forward returns; by default its ``loss``, or else the sum of its tensors."""
    hardware: Hardware | None = None
    """What it runs on; ``None``: what is found here, with the links of datasheets."""
    reserve: float = 0.1
    """Part of the device's memory that is left alone."""
    offload: bool = True
    """Whether parameters may be kept in host memory."""
    tensor_parallel: bool = True
    """Whether matrices may be divided, where the model brings a plan for it. Ranks that share matrices share samples,
    so that a step has fewer of them."""

    def __post_init__(self) -> None:
        if self.sequence_length is not None and self.example_inputs is not None:
            raise ConfigError(
                f"`sequence_length={self.sequence_length}` and `example_inputs` were both given, and the inputs have a "
                f"length of their own. Give one of them."
            )
        for name, what in (("batch_size", "samples"), ("sequence_length", "tokens")):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"`{name}={value!r}` is no number of {what}. Give a positive integer.")
        if not 0 <= self.reserve < 1:
            raise ConfigError(
                f"`reserve={self.reserve!r}` is no part of a device's memory. Give 0 or more, and less than 1."
            )
