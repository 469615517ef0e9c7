"""Sequence parallel in attention by exchanging heads for tokens, as DeepSpeed-Ulysses does (arXiv:2309.14509).

Outside attention each rank holds some tokens with all heads; inside, all tokens with some heads. The exchange is an
all-to-all before and one after, and what is between is plain attention over the whole sequence, causal or not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from accel_parallel.sequence.layout import SequenceLayout
from accel_state.errors import ConfigError

__all__ = ["attend_by_heads", "check_heads"]


class _Exchange(torch.autograd.Function):
    """(ranks, n): row *r* goes to rank *r*, and row *r* of what comes back is from rank *r*. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, rows.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


def check_heads(heads: int, size: int, *, what: str = "attention") -> None:
    """Refuse heads that cannot be dealt out.

    Raises:
        ConfigError: with the numbers.
    """
    if heads % size:
        divisors = [number for number in range(2, heads + 1) if heads % number == 0]
        raise ConfigError(
            f"{what} has {heads} head(s), which cannot be dealt out evenly to {size} ranks. Set `sp_size` to a divisor "
            f"of {heads}{f' ({divisors})' if divisors else ''}, or use `cp_size`, which divides no heads."
        )


def attend_by_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Every rank must call this. Attention of this rank's queries to the whole sequence.

    Key and value heads that are too few for the ranks are repeated as often as needed and no more.

    Args:
        query: (batch, heads, tokens, width), this rank's tokens.
        key: likewise, with as many heads, or fewer with ``enable_gqa=True``.
        value: likewise.
        layout: who holds which tokens.
        group: whose ranks share the sequence.
        attn_mask: as of torch's function, over the whole sequence in both dimensions; with heads of its own in the
            dimension before, all of them.
        dropout_p: as of torch's function.
        is_causal: whether each token sees itself and earlier ones only.
        scale: as of torch's function.
        enable_gqa: as of torch's function.

    Raises:
        ConfigError: for heads that cannot be dealt out, and masks over something else.
    """
    ranks, heads = group.size(), query.shape[1]
    check_heads(heads, ranks)
    if attn_mask is not None:
        attn_mask = _own_heads(attn_mask, heads, query.shape[-2] * ranks, group)
    times = _repeats(heads, key.shape[1], ranks) if enable_gqa else 1
    if times > 1:
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    query, key, value = _exchange_heads((query, key, value), group)
    answer = functional.scaled_dot_product_attention(
        query, key, value,
        attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa and key.shape[1] != query.shape[1],
    )  # fmt: skip
    return _exchange_tokens(answer, group)


def _repeats(heads: int, shared: int, ranks: int) -> int:
    """The least number of times that each key head is repeated, so that every rank has those that its queries use."""
    most = heads // shared
    return next(times for times in range(1, most + 1) if most % times == 0 and shared * times % ranks == 0)


def _exchange_heads(tensors: tuple[torch.Tensor, ...], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """(batch, heads, tokens, width) each -> (batch, heads / ranks, all tokens, width), in one exchange."""
    ranks = group.size()
    # (batch, heads, tokens, width) -> (ranks, batch * heads / ranks * tokens * width)
    rows = [torch.stack(tensor.chunk(ranks, dim=1)).flatten(1) for tensor in tensors]
    received: torch.Tensor = _Exchange.apply(torch.cat(rows, dim=1), group)  # type: ignore[no-untyped-call]
    found = []
    for tensor, part in zip(tensors, torch.split(received, [row.shape[1] for row in rows], dim=1), strict=True):
        batch, heads, tokens, width = tensor.shape
        parts = part.view(ranks, batch, heads // ranks, tokens, width)
        found.append(torch.cat(parts.unbind(0), dim=2))
    return found


def _exchange_tokens(answer: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(batch, heads / ranks, all tokens, width) -> (batch, heads, tokens, width)."""
    ranks = group.size()
    parts = torch.stack(answer.chunk(ranks, dim=2))  # (ranks, batch, heads / ranks, tokens, width)
    received: torch.Tensor = _Exchange.apply(parts, group)  # type: ignore[no-untyped-call]
    return torch.cat(received.unbind(0), dim=1)


def _own_heads(attn_mask: torch.Tensor, heads: int, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    rows = attn_mask.shape[-2] if attn_mask.dim() > 1 else 1
    if attn_mask.shape[-1] != length or rows not in (1, length):
        raise ConfigError(
            f"Attention was called with a mask of shape {tuple(attn_mask.shape)}, and it runs over {length} tokens, of "
            f"which this rank holds {length // group.size()}: a mask over those says nothing of the others. Pass none "
            f"(`is_causal=True` for causal attention), or one whose last dimensions are ({length}, {length})."
        )
    if attn_mask.dim() >= 3 and attn_mask.shape[-3] == heads:
        return attn_mask.chunk(group.size(), dim=-3)[group.rank()]
    return attn_mask
