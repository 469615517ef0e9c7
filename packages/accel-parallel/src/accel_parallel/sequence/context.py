"""Context parallel in attention: keys and values are gathered, and each rank answers the queries of its own tokens.

As in the Llama 3 report (arXiv:2407.21783, section 3.3.2): keys and values are small beside queries where heads share
them, one collective a layer moves them all, and any kernel can compute what follows. Plain tensor operations with
gradients, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from accel_parallel.sequence.layout import SequenceLayout
from accel_state.errors import ConfigError

__all__ = ["attend_in_context", "gather_parts", "gather_sequence"]


# torch 2.13 renames these two and calls the old names deprecated.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """(n,) of each rank -> (ranks, n) on all of them. Backward adds up what the ranks want of each part."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        whole = tensor.new_empty(group.size() * tensor.numel())
        _all_gather(whole, tensor.contiguous(), group=group)
        return whole.view(group.size(), -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SumParts.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


class _SumParts(torch.autograd.Function):
    """(ranks, n) of each rank -> the sum over ranks of this rank's row, (n,). What `_Gather` is backwards."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        if tensor.device.type == "cpu" or dist.get_backend(group) == "gloo":  # which has no reduce-scatter in torch 2.6
            total = tensor.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=group)
            return total[group.rank()].clone()
        part = tensor.new_empty(tensor.shape[1])
        _reduce_scatter(part, tensor.contiguous().view(-1), group=group)
        return part

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Gather.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


def gather_parts(tensors: tuple[torch.Tensor, ...], group: dist.ProcessGroup) -> list[list[torch.Tensor]]:
    """Every rank must call this. For each tensor (all of one dtype) those of all ranks, in order, in one exchange.

    Gradients flow back: each rank gets the sum of what all ranks want of its tensors.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)
    rows: torch.Tensor = _Gather.apply(flat, group)  # type: ignore[no-untyped-call]
    columns = torch.split(rows, [tensor.numel() for tensor in tensors], dim=1)
    return [
        [row.view(tensor.shape) for row in column.unbind(0)] for tensor, column in zip(tensors, columns, strict=True)
    ]


def gather_sequence(
    tensors: tuple[torch.Tensor, ...], layout: SequenceLayout, group: dist.ProcessGroup, *, dim: int
) -> list[torch.Tensor]:
    """Every rank must call this. Each tensor over the whole sequence, in order, from the ranks' parts along `dim`."""
    return [layout.join(parts, dim=dim) for parts in gather_parts(tensors, group)]


def attend_in_context(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    **options: Any,
) -> torch.Tensor:
    """Every rank must call this. Attention of this rank's queries to the whole sequence.

    Under a causal mask each of the two chunks of queries is compared with the keys up to its own end and with no more:
    half the work of a masked whole, and as much on every rank.

    Args:
        query: (..., heads, tokens, width), this rank's tokens.
        key: likewise, with as many heads, or fewer with ``enable_gqa=True``.
        value: likewise.
        layout: who holds which tokens.
        group: whose ranks share the sequence.
        attn_mask: as of torch's function, rows for this rank's queries and columns for the whole sequence.
        dropout_p: as of torch's function.
        is_causal: whether each token sees itself and earlier ones only.
        options: ``scale`` and ``enable_gqa`` of torch's function.
    """
    tokens = query.shape[-2]
    keys, values = gather_sequence((key, value), layout, group, dim=-2)
    attend = functional.scaled_dot_product_attention
    if not is_causal:
        if attn_mask is not None:
            _check_mask(attn_mask, tokens, keys.shape[-2])
        return attend(query, keys, values, attn_mask=attn_mask, dropout_p=dropout_p, **options)
    from torch.nn.attention.bias import causal_lower_right  # loads torch's compiler, which takes long

    answers = []
    for chunk, (_, end) in zip(query.chunk(2, dim=-2), layout.spans(keys.shape[-2]), strict=True):
        bias = causal_lower_right(chunk.shape[-2], end)
        seen, told = keys.narrow(-2, 0, end), values.narrow(-2, 0, end)
        answers.append(attend(chunk, seen, told, attn_mask=bias, dropout_p=dropout_p, **options))
    return torch.cat(answers, dim=-2)


def _check_mask(attn_mask: torch.Tensor, tokens: int, length: int) -> None:
    rows = attn_mask.shape[-2] if attn_mask.dim() > 1 else 1
    if attn_mask.shape[-1] != length or rows not in (1, tokens):
        raise ConfigError(
            f"Attention was called with a mask of shape {tuple(attn_mask.shape)}, and this rank holds {tokens} of "
            f"{length} tokens: a mask over its own tokens says nothing of the others. Pass none (`is_causal=True` for "
            f"causal attention), or one whose last dimensions are ({tokens}, {length}): its queries and all keys."
        )
