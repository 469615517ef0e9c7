"""A transformer's profile from its sizes alone: no module, no torch. Pure.

Counts follow Korthikanti et al., "Reducing activation recomputation in large transformer models", arXiv:2205.05198,
section 4.1, with each tensor named, so that gated layers, fewer key-value heads and fused attention can be told apart.
For a GPT in 16 bits with dropout and attention that writes its scores they add up to that paper's
``s b h (34 + 5 a s / h)`` bytes a block. Operations: two for each weight and token in forward, four in backward (Kaplan
et al., arXiv:2001.08361, section 2.1), besides four (eight) for each pair of tokens and each element of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from accel_parallel.auto.profile import BlockKind, DTypeName, Footprint, Growth, ModelProfile, UnitPass, Weights
from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError

__all__ = ["TransformerSizes", "transformer_profile"]

_DTYPE_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSizes:
    """What the blocks of a transformer are made of."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    num_kv_heads: int | None = None
    """Heads of keys and values; ``None``: as many as of queries."""
    head_size: int | None = None
    """Elements of a head; ``None``: the hidden size divided by the heads."""
    intermediate_size: int | None = None
    """Between the two matrices of the MLP; ``None``: four times the hidden size."""
    gated: bool = False
    """Whether the MLP has a third matrix that gates it, as in Llama."""
    inner_copies: int | None = None
    """Tensors of that size that are kept: more where the activation function is made of many operations. ``None``:
    before and after the activation, and if gated, gate and product too."""
    attention: Literal["fused", "eager"] = "fused"
    """Whether scores of all pairs of tokens are kept (``"eager"``)."""
    dropout: bool = False
    tied: bool = False
    """Whether the output layer shares the embedding's weight."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "vocab_size"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"`{name}={getattr(self, name)!r}` makes no transformer. Give a positive integer.")
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"`num_kv_heads={self.num_kv_heads}` does not divide `num_heads={self.num_heads}`, so queries cannot "
                f"share them evenly. Change one of them."
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def inner(self) -> int:
        """Elements between the two matrices of the MLP."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def copies(self) -> int:
        """Tensors between the matrices of the MLP that are kept for backward."""
        return self.inner_copies or (4 if self.gated else 2)

    @property
    def query_size(self) -> int:
        """Elements of all heads of queries."""
        return self.num_heads * (self.head_size or self.hidden_size // self.num_heads)

    @property
    def kv_size(self) -> int:
        """Elements of all heads of keys."""
        return self.query_size // self.num_heads * self.kv_heads

    @property
    def matrix_numel(self) -> int:
        """Weights of the matrices of a block."""
        attention = 2 * self.hidden_size * (self.query_size + self.kv_size)
        return attention + (3 if self.gated else 2) * self.hidden_size * self.inner


def transformer_profile(
    sizes: TransformerSizes,
    *,
    name: str = "transformer",
    precision: MixedPrecision = "no",
    dtype: DTypeName = "float32",
    sequence_length: int = 2048,
) -> ModelProfile:
    """The profile of a decoder with these sizes, all of it trained.

    Args:
        sizes: of the model.
        name: how reports call it.
        precision: mixed precision of the run.
        dtype: in which parameters are stored.
        sequence_length: tokens of a sample, unless `select_plan` is told another.
    """
    element = _DTYPE_BYTES[dtype]
    compute = 2 if precision != "no" else element
    block = _weights(sizes.matrix_numel + 2 * sizes.hidden_size, element, tp_numel=sizes.matrix_numel)
    embedding = sizes.vocab_size * sizes.hidden_size
    root = _weights((1 if sizes.tied else 2) * embedding + sizes.hidden_size, element, tp_numel=0)
    cast_bytes = 2.0 if precision != "no" and element > 2 else 0.0
    whole = _footprint(sizes, compute, element)
    whole = replace(
        whole,
        blocks=tuple(replace(unit, cast_bytes=cast_bytes * sizes.matrix_numel) for unit in whole.blocks),
        root_cast_bytes=cast_bytes * embedding,
    )
    return ModelProfile(
        name=name, root=root, blocks=(BlockKind(name="block", count=sizes.num_layers, weights=block),),
        whole=whole, sharded=_footprint(sizes, compute, compute), precision=precision, dtype=dtype,
        head_share=(embedding + sizes.hidden_size) / root.numel,
        tied_share=embedding / root.numel if sizes.tied else 0.0, hidden_size=sizes.hidden_size,
        num_heads=sizes.num_heads, num_kv_heads=sizes.kv_heads, tp_sizes=_common_divisors(sizes),
        sequence_length=sequence_length,
        notes=("activations and operations by formula, from the sizes of the model",),
    )  # fmt: skip


def _common_divisors(sizes: TransformerSizes) -> tuple[int, ...]:
    return tuple(size for size in range(2, sizes.kv_heads + 1) if sizes.kv_heads % size == sizes.num_heads % size == 0)


def _weights(numel: int, element: int, *, tp_numel: int) -> Weights:
    return Weights(
        numel=numel, size_bytes=element * numel, trainable_numel=numel, trainable_bytes=element * numel,
        tp_numel=tp_numel,
    )  # fmt: skip


def _footprint(sizes: TransformerSizes, element: int, residual: int) -> Footprint:
    """Where operations round to `element` bytes and hidden states between blocks have `residual` bytes."""
    hidden, vocab = sizes.hidden_size, sizes.vocab_size
    root_flops = 2.0 * vocab * hidden
    return Footprint(
        blocks=(_block_pass(sizes, element, residual),),
        stem=Growth(per_token=8.0 + residual * hidden),  # token ids, embeddings
        head=Growth(per_token=(residual + element) * hidden + 4.0 * vocab),  # inputs of norm and layer, log p
        head_extra=Growth(per_token=8.0 * vocab),  # gradients of these and of the logits, in float32
        root_forward_flops=Growth(per_token=root_flops),
        root_backward_flops=Growth(per_token=2.0 * root_flops),
    )


def _block_pass(sizes: TransformerSizes, element: int, residual: int) -> UnitPass:
    hidden, inner, masks = sizes.hidden_size, sizes.inner, 1 if sizes.dropout else 0
    # Inputs of two norms and of two layers, masks of two dropouts; norms of Llama keep what they normalized besides.
    norms = 2 * (max(residual, 4) + residual) * hidden if sizes.gated else 2 * residual * hidden
    outside = norms + 2 * element * hidden + 2 * masks * hidden
    attention = element * (2 * sizes.query_size + 2 * sizes.kv_size)  # q, k, v, and what the output layer takes
    mlp = element * sizes.copies * inner
    scores = sizes.num_heads * (element + masks * (element + 1)) if sizes.attention == "eager" else 0
    pairs = 4.0 * sizes.query_size
    matrices = 2.0 * sizes.matrix_numel
    return UnitPass(
        kept=Growth(per_token=outside + attention + mlp, per_pair=scores),
        output=Growth(per_token=residual * hidden),
        forward_extra=Growth(per_token=residual * hidden),
        backward_extra=Growth(
            per_token=2 * residual * hidden + element * (3 if sizes.gated else 2) * inner,
            per_pair=2 * element * sizes.num_heads if sizes.attention == "eager" else 0,
        ),
        forward_flops=Growth(per_token=matrices, per_pair=pairs),
        backward_flops=Growth(per_token=2.0 * matrices, per_pair=2.0 * pairs),
        tp_share=(attention + mlp) / (outside + attention + mlp),
    )
