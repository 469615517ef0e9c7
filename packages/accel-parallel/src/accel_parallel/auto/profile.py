"""What a model costs, in numbers that outlive it: weights by unit, and what one micro-batch keeps and computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError

__all__ = ["BlockKind", "DTypeName", "Footprint", "Growth", "ModelProfile", "UnitPass", "Weights"]

DTypeName = Literal["float64", "float32", "bfloat16", "float16"]
"""Dtypes in which a device's speed is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """An amount that grows with a micro-batch: ``batch_size * (per_sample + s * per_token + s**2 * per_pair)``.

    ``s`` is the sequence length; where a model has none, only `per_sample` is set.
    """

    per_sample: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0

    def at(self, batch_size: int, sequence_length: int) -> float:
        """The amount for `batch_size` samples of `sequence_length` tokens."""
        return batch_size * (
            self.per_sample + sequence_length * self.per_token + sequence_length * sequence_length * self.per_pair
        )

    def times(self, factor: float) -> Growth:
        """`factor` of it."""
        return Growth(
            per_sample=factor * self.per_sample, per_token=factor * self.per_token, per_pair=factor * self.per_pair
        )

    def __add__(self, other: Growth) -> Growth:
        return Growth(
            per_sample=self.per_sample + other.per_sample,
            per_token=self.per_token + other.per_token,
            per_pair=self.per_pair + other.per_pair,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Parameters of one unit, a tied one counted once."""

    numel: int = 0
    size_bytes: int = 0
    trainable_numel: int = 0
    trainable_bytes: int = 0
    tp_numel: int = 0
    """Elements that tensor parallel divides; the others are whole on each of its ranks."""

    def share(self, tp: int) -> float:
        """The part of them that one of `tp` tensor-parallel ranks holds."""
        return 1.0 if tp == 1 or not self.numel else 1.0 - self.tp_numel / self.numel * (1.0 - 1.0 / tp)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockKind:
    """Blocks of one class and size that follow each other. Each is gathered, and recomputed, at once."""

    name: str
    """Name of their class."""
    count: int
    weights: Weights
    """Of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitPass:
    """What a micro-batch's way through one block keeps (bytes) and computes (floating-point operations)."""

    kept: Growth = Growth()
    """Bytes that forward leaves behind for backward, the block's output included."""
    output: Growth = Growth()
    """Of these the output, which is all that stays where the block is computed a second time."""
    forward_extra: Growth = Growth()
    """Bytes on top of `kept` at the worst moment of forward."""
    backward_extra: Growth = Growth()
    """Bytes on top of `kept` at the worst moment of backward, gradients of parameters left out."""
    forward_flops: Growth = Growth()
    backward_flops: Growth = Growth()
    cast_bytes: float = 0.0
    """Copies of the weights in lower precision, where autocast makes them."""
    tp_share: float = 0.0
    """Part of `kept` and of both extras that tensor parallel divides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What one micro-batch keeps and computes in all, unit by unit, in the order of the profile's blocks."""

    blocks: tuple[UnitPass, ...] = ()
    """One a kind."""
    stem: Growth = Growth()
    """Bytes that outside of blocks, up to the last one, are kept for backward."""
    head: Growth = Growth()
    """Bytes kept after the last block: logits, log-probabilities, loss."""
    head_extra: Growth = Growth()
    """Bytes on top of these while forward and backward go through it."""
    root_forward_flops: Growth = Growth()
    root_backward_flops: Growth = Growth()
    root_cast_bytes: float = 0.0
    """Copies in lower precision of the weights outside of blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """All that a plan is chosen by. Pure: made by `profile_model` from a module, or by `transformer_profile`."""

    name: str
    root: Weights
    """Parameters outside of blocks."""
    blocks: tuple[BlockKind, ...]
    whole: Footprint
    """Of a model whose parameters are whole: under mixed precision, autocast rounds them in each operation."""
    sharded: Footprint
    """Of one whose parameters are gathered: under mixed precision, in the lower precision at once."""
    precision: MixedPrecision = "no"
    dtype: DTypeName = "float32"
    """In which parameters are stored (most of them)."""
    buffer_bytes: int = 0
    head_share: float = 1.0
    """Part of `root` whose gradients come before those of any block, since it is used after them."""
    tied_share: float = 0.0
    """Part of `root` that is used in several places, whose gradients are added up at the end of backward."""
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    tp_sizes: tuple[int, ...] = ()
    """Over how many ranks tensor parallel can divide its matrices; empty where no plan says how."""
    sequence_length: int | None = None
    """At which it was measured; ``None``: its samples have no length that could be changed."""
    notes: tuple[str, ...] = ()
    """What was assumed instead of measured."""

    def __post_init__(self) -> None:
        if self.precision not in get_args(MixedPrecision):
            raise ConfigError(
                f"`precision={self.precision!r}` is not a mixed precision. "
                f"Use one of {', '.join(get_args(MixedPrecision))}."
            )
        for footprint in (self.whole, self.sharded):
            assert len(footprint.blocks) == len(self.blocks)

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return self.root.numel + sum(kind.count * kind.weights.numel for kind in self.blocks)

    @property
    def num_trainable(self) -> int:
        """Parameters that are trained."""
        return self.root.trainable_numel + sum(kind.count * kind.weights.trainable_numel for kind in self.blocks)

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters as they are stored."""
        return self.root.size_bytes + sum(kind.count * kind.weights.size_bytes for kind in self.blocks)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the parameters that are trained."""
        return self.root.trainable_bytes + sum(kind.count * kind.weights.trainable_bytes for kind in self.blocks)

    @property
    def is_mixed(self) -> bool:
        """Whether it computes in another dtype than parameters have."""
        return self.precision != "no"

    @property
    def compute_dtype(self) -> DTypeName:
        """In which matrices are multiplied."""
        return _COMPUTE.get(self.precision, self.dtype)

    def gathered_bytes(self, weights: Weights) -> float:
        """Bytes of `weights` where they are gathered: in the lower precision, if there is one."""
        return 2.0 * weights.numel if self.is_mixed else float(weights.size_bytes)

    def gradient_bytes(self, weights: Weights) -> float:
        """Bytes of their gradients as backward computes them, before these are reduced."""
        return 2.0 * weights.trainable_numel if self.is_mixed else float(weights.trainable_bytes)

    def reduced_bytes(self, weights: Weights) -> float:
        """Bytes of their gradients as sharding reduces them: in float32 under mixed precision."""
        return 4.0 * weights.trainable_numel if self.is_mixed else float(weights.trainable_bytes)


_COMPUTE: dict[str, DTypeName] = {"bf16": "bfloat16", "fp16": "float16"}
