"""Gathered keys and values: attention and its gradients equal one process with the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from accel_parallel import TorchContextParallelConfig
from accel_parallel.sequence.attention import SequenceParallel
from accel_parallel.sequence.context import attend_in_context, gather_sequence
from accel_parallel.sequence.layout import SequenceLayout
from accel_state import ConfigError, Process, ProcessSettings
from accel_state.testing import run_ranks


def tensors(heads: int, shared: int, length: int) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the answer, over the whole sequence. Values are wider than keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, 6), (shared, 6), (shared, 4), (heads, 4))
    return [torch.randn(2, number, length, width, generator=generator, dtype=torch.float64) for number, width in shapes]


def own_group() -> tuple[Any, SequenceLayout]:
    group = torch.distributed.group.WORLD
    assert group is not None
    return group, SequenceLayout(kind="context", size=group.size(), rank=group.rank())


def attend(length: int, heads: int, shared: int, is_causal: bool, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """On a rank: the answer and the gradients of what it holds."""
    group, layout = own_group()
    *inputs, gradient = (layout.take(each, dim=2) for each in tensors(heads, shared, length))
    for each in inputs:
        each.requires_grad_()
    if mask is not None and mask.shape[-2] > 1:
        mask = layout.take(mask, dim=mask.dim() - 2)
    answer = attend_in_context(
        *inputs, layout=layout, group=group, attn_mask=mask, dropout_p=0.0, is_causal=is_causal, scale=0.3,
        enable_gqa=heads != shared,
    )  # fmt: skip
    answer.backward(gradient)
    return [answer.detach(), *(each.grad for each in inputs if each.grad is not None)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("heads", "shared", "is_causal", "mask"),
    [
        (4, 4, True, None),
        (4, 2, True, None),
        (3, 1, False, None),
        (2, 2, False, torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.3),
        (2, 2, False, torch.randn(1, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)),
    ],
    ids=["causal", "grouped", "all-to-all", "mask", "bias-a-key"],
)
def test_attention_equals_that_over_the_whole(
    ranks: int, heads: int, shared: int, is_causal: bool, mask: torch.Tensor | None
) -> None:
    *inputs, gradient = tensors(heads, shared, 16)
    for each in inputs:
        each.requires_grad_()
    answer = attention(*inputs, attn_mask=mask, is_causal=is_causal, scale=0.3, enable_gqa=heads != shared)
    answer.backward(gradient)
    parts = run_ranks(attend, ranks, 16, heads, shared, is_causal, mask)
    layout = SequenceLayout(kind="context", size=ranks, rank=0)
    wanted = [answer.detach(), *(each.grad for each in inputs)]
    for index, tensor in enumerate(wanted):
        assert tensor is not None
        torch.testing.assert_close(layout.join([part[index] for part in parts], dim=2), tensor, rtol=0, atol=1e-10)


def gather_and_differentiate_twice() -> tuple[bool, float]:
    """On a rank: what is gathered, and whether gradients of gradients are right too."""
    group, layout = own_group()
    whole = torch.arange(8, dtype=torch.float64)
    part = layout.take(whole, dim=0).requires_grad_()
    gathered = gather_sequence((part, part * 2), layout, group, dim=0)
    same = torch.equal(gathered[0], whole) and torch.equal(gathered[1], 2 * whole)
    # The sum over ranks of x^3: its first derivative is 2 ranks * 3x^2, the second 2 ranks * 6x.
    (first,) = torch.autograd.grad(gathered[0].pow(3).sum(), part, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), part)
    error = (first - 6 * part.square()).abs().max() + (second - 12 * part).abs().max()
    return same, error.item()


def test_parts_are_gathered_and_gradients_added_up() -> None:
    assert run_ranks(gather_and_differentiate_twice, 2) == [(True, 0.0), (True, 0.0)]


def refuse_a_mask_of_its_own_tokens() -> str:
    group, layout = own_group()
    query = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ConfigError) as caught:
        attend_in_context(
            query, query, query, layout=layout, group=group, attn_mask=torch.ones(4, 4).tril() > 0, dropout_p=0.0,
            is_causal=False,
        )  # fmt: skip
    return str(caught.value)


def test_a_mask_over_one_part_is_refused() -> None:
    for message in run_ranks(refuse_a_mask_of_its_own_tokens, 2):
        assert "mask of shape (4, 4), and this rank holds 4 of 8 tokens" in message
        assert "last dimensions are (4, 8)" in message


def open_ring_on_the_cpu() -> str:
    with pytest.raises(ConfigError) as caught:
        SequenceParallel(own_group()[0], kind="context", backend="torch", device_type=Process.current().device.type)
    return str(caught.value)


def test_torch_ring_attention_has_no_kernels_on_the_cpu() -> None:
    for message in run_ranks(open_ring_on_the_cpu, 2):
        assert "`cp_backend='torch'` was set on cpu" in message
        assert "Leave `cp_backend` at 'native'" in message


class Attend(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, is_causal=True)


def attend_on_gpus(backend: Any) -> list[torch.Tensor]:
    """On a rank with a GPU: the answer and the gradients of what it holds, in bfloat16."""
    group, _ = own_group()
    options = None if backend == "native" else TorchContextParallelConfig(cp_comm_strategy="alltoall")
    sequence = SequenceParallel(group, kind="context", backend=backend, options=options, device_type="cuda")
    model = Attend()
    sequence.attach(model)
    whole = [tensor[..., :4].to(Process.current().device, torch.bfloat16) for tensor in tensors(2, 2, 256)]
    with sequence.context_parallel(buffers=whole, buffer_seq_dims=[2] * 4):
        *inputs, gradient = (each.clone() for each in whole)
        for each in inputs:
            each.requires_grad_()
        answer = model(*inputs)
        answer.backward(gradient)
    return [each.detach().float().cpu() for each in (answer, *(each.grad for each in inputs)) if each is not None]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: their kernels and NCCL")
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_attention_on_gpus_equals_that_over_the_whole(backend: str) -> None:
    *inputs, gradient = (tensor[..., :4] for tensor in tensors(2, 2, 256))
    for each in inputs:
        each.requires_grad_()
    answer = attention(*inputs, is_causal=True)
    answer.backward(gradient)
    parts = run_ranks(attend_on_gpus, 2, backend, settings=ProcessSettings(device="cuda"))
    layout = SequenceLayout(kind="context", size=2, rank=0)
    for index, tensor in enumerate([answer.detach(), *(each.grad for each in inputs)]):
        assert tensor is not None
        found = layout.join([part[index] for part in parts], dim=2)
        torch.testing.assert_close(found, tensor.float(), rtol=5e-2, atol=5e-2)
