"""Heads exchanged for tokens: attention and its gradients equal one process with the whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from accel_parallel.sequence.layout import SequenceLayout
from accel_parallel.sequence.ulysses import attend_by_heads, check_heads
from accel_state import ConfigError
from accel_state.testing import run_ranks

LENGTH = 12


def tensors(heads: int, shared: int) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the answer, over the whole sequence. Values are wider than keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, 4), (shared, 4), (shared, 6), (heads, 6))
    return [torch.randn(2, number, LENGTH, width, generator=generator, dtype=torch.float64) for number, width in shapes]


def attend(heads: int, shared: int, is_causal: bool, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """On a rank: the answer and the gradients of what it holds."""
    group = torch.distributed.group.WORLD
    assert group is not None
    layout = SequenceLayout(kind="ulysses", size=group.size(), rank=group.rank())
    *inputs, gradient = (layout.take(each, dim=2) for each in tensors(heads, shared))
    for each in inputs:
        each.requires_grad_()
    answer = attend_by_heads(
        *inputs, layout=layout, group=group, attn_mask=mask, dropout_p=0.0, is_causal=is_causal, scale=None,
        enable_gqa=heads != shared,
    )  # fmt: skip
    answer.backward(gradient)
    return [answer.detach(), *(each.grad for each in inputs if each.grad is not None)]


@pytest.mark.parametrize(
    ("ranks", "heads", "shared", "is_causal", "mask"),
    [
        (2, 4, 4, True, None),
        (4, 4, 4, False, None),
        (4, 8, 2, True, None),  # fewer key heads than ranks
        (2, 6, 3, True, None),  # key heads that the ranks do not divide
        (2, 12, 3, False, None),
        (2, 4, 1, True, None),
        (2, 2, 2, False, torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3),
        (2, 4, 4, False, torch.rand(4, 1, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3),
    ],
    ids=["causal", "all-to-all", "few-shared", "odd-shared", "odd-shared-all", "one-shared", "mask", "mask-a-head"],
)
def test_attention_equals_that_over_the_whole(
    ranks: int, heads: int, shared: int, is_causal: bool, mask: torch.Tensor | None
) -> None:
    *inputs, gradient = tensors(heads, shared)
    for each in inputs:
        each.requires_grad_()
    answer = attention(*inputs, attn_mask=mask, is_causal=is_causal, enable_gqa=heads != shared)
    answer.backward(gradient)
    parts = run_ranks(attend, ranks, heads, shared, is_causal, mask)
    layout = SequenceLayout(kind="ulysses", size=ranks, rank=0)
    wanted = [answer.detach(), *(each.grad for each in inputs)]
    for index, tensor in enumerate(wanted):
        assert tensor is not None
        torch.testing.assert_close(layout.join([part[index] for part in parts], dim=2), tensor, rtol=0, atol=1e-10)


def refusals() -> list[str]:
    messages = []
    for heads, mask in ((3, None), (2, torch.ones(6, 6, dtype=torch.bool)), (2, torch.ones(6, 12, dtype=torch.bool))):
        with pytest.raises(ConfigError) as caught:
            attend(heads, heads, False, mask)
        messages.append(str(caught.value))
    return messages


def test_heads_and_masks_that_cannot_be_divided_are_refused() -> None:
    for heads, own, rows in run_ranks(refusals, 2):
        assert "3 head(s), which cannot be dealt out evenly to 2 ranks" in heads
        assert "mask of shape (6, 6), and it runs over 12 tokens, of which this rank holds 6" in own
        assert "last dimensions are (12, 12)" in rows


def test_heads_are_checked_by_their_numbers() -> None:
    check_heads(8, 4)
    with pytest.raises(ConfigError, match=r"`Net` has 6 head\(s\).*4 ranks.*divisor of 6 \(\[2, 3, 6\]\)"):
        check_heads(6, 4, what="`Net`")
    with pytest.raises(ConfigError, match=r"divisor of 1, or use `cp_size`"):
        check_heads(1, 2)
