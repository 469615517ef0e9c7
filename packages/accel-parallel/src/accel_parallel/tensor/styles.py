"""How one module is divided over tensor-parallel ranks: the styles, their spellings, and those that are refused.

Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3: a matrix divided by columns, then one divided by rows, needs
one sum in forward and one in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accel_state.errors import ConfigError

__all__ = ["SUPPORTED", "Style", "resolve_style"]

Kind = Literal["linear", "embedding", "any", "value"]
Entry = Literal["whole", "divided", "split", "rows", "untouched"]
Exit = Literal["divided", "gathered", "summed", "kept", "untouched"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """What becomes of a module's parameters, of its input and of its output."""

    name: str
    kind: Kind
    """The modules it is for; ``"value"``: a parameter or a whole number that a module holds itself."""
    weight_dim: int | None = None
    """The dimension along which ``weight`` is divided."""
    bias_dim: int | None = None
    """The dimension along which ``bias`` is divided; ``None``: each rank holds it whole."""
    entry: Entry = "untouched"
    """``"whole"``: alike on all ranks; ``"divided"``: each rank's part; ``"split"``: alike, and each rank takes its
    part; ``"rows"``: indices alike on all ranks, each rank looks up those of its rows."""
    exit: Exit = "untouched"
    """``"divided"``: each rank's part; ``"gathered"``: the parts beside each other; ``"summed"``: the sum of the parts;
    ``"kept"``: the parts as one `DTensor`, for `loss_parallel`."""
    sums_gradients: bool = False
    """Whether the gradients of its parameters, whole on every rank, cover this rank's part only and must be summed."""

    @property
    def divides(self) -> bool:
        return self.weight_dim is not None


_LINEAR = (
    Style(name="colwise", kind="linear", weight_dim=0, bias_dim=0, entry="whole", exit="divided"),
    Style(name="colwise_by_head", kind="linear", weight_dim=0, bias_dim=0, entry="whole", exit="divided"),
    Style(name="colwise_gather_output", kind="linear", weight_dim=0, bias_dim=0, entry="whole", exit="gathered"),
    Style(name="colwise_keep_output", kind="linear", weight_dim=0, bias_dim=0, entry="whole", exit="kept"),
    Style(name="rowwise", kind="linear", weight_dim=1, entry="divided", exit="summed"),
    Style(name="rowwise_split_input", kind="linear", weight_dim=1, entry="split", exit="summed"),
)
_OTHER = (
    Style(name="embedding_rowwise", kind="embedding", weight_dim=0, entry="rows", exit="summed"),
    Style(name="embedding_colwise", kind="embedding", weight_dim=1, exit="gathered"),
    Style(name="replicate", kind="any"),
    Style(name="replicated_with_grad_allreduce", kind="any", sums_gradients=True),
    Style(name="divide", kind="value", weight_dim=0),
)
_STYLES = {style.name: style for style in (*_LINEAR, *_OTHER)}

SUPPORTED = tuple(_STYLES)

_SPELLINGS = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
    "local_colwise": "colwise",
    "local_rowwise": "rowwise",
    "replicated": "replicate",
    "local_params": "replicate",  # a module's own parameters are always used as plain tensors here
}
"""Names that transformers uses, or used in version 4, for the same."""

_OF_AN_EMBEDDING = {
    "rowwise": "embedding_rowwise",
    "rowwise_split_input": "embedding_rowwise",
    "colwise_gather_output": "embedding_colwise",
}
"""What the style of a matrix means for a table of embeddings, as torch has it."""

_OF_A_VALUE = {"colwise": "divide"}
"""What the style of a matrix means for a parameter that a module holds itself, such as attention sinks."""

_EXPERTS = "divides a mixture of experts, which this version does not"
_PACKED = (
    "divides a fused matrix block by block, which this version does not. Use 'colwise_gather_output' and, for the "
    "matrix behind it, 'rowwise_split_input'"
)
_REFUSED = {
    "sequence_parallel": (
        "divides what flows between the layers along the sequence, which this version does not. Leave the module out"
    ),
    "packed_colwise": _PACKED,
    "packed_rowwise": _PACKED,
    "local_packed_rowwise": _PACKED,
    "mla_kv_a_proj": (
        "is for latent attention, a part of whose keys goes round the divided matrices, and this version does not "
        "follow it. Leave out every module of these attentions"
    ),
    "all_reduce": "sums what divided experts give, and these are not divided in this version",
    "gather": "sums what divided experts give, and these are not divided in this version",
    "local": "leaves a module with each rank's own part, which only experts need",
    "moe_tp_experts": _EXPERTS,
    "moe_identity_expert": _EXPERTS,
    "grouped_gemm": _EXPERTS,
    "ep_router": _EXPERTS,
    "ep_dispatch_experts": _EXPERTS,
}


def resolve_style(name: str, *, target: str, kind: Literal["embedding", "value"] | None = None) -> Style:
    """The style that a plan means by `name`.

    Args:
        target: what the plan gives it to, for the message.
        kind: what that is, where names have another meaning for it: ``"rowwise"`` are the rows of an embedding.

    Raises:
        ConfigError: for a style that is unknown or not supported, with those that are.
    """
    style = _SPELLINGS.get(name, name)
    if kind is not None:
        style = (_OF_AN_EMBEDDING if kind == "embedding" else _OF_A_VALUE).get(style, style)
    if style in _STYLES:
        return _STYLES[style]
    because = _REFUSED.get(style, "is no style of tensor parallelism known here")
    raise ConfigError(
        f"The plan gives `{target}` the style {name!r}, which {because}. Supported: {', '.join(map(repr, SUPPORTED))}."
    )
