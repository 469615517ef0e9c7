"""Models whose attention is caught: outputs, losses and gradients equal one process with the whole sequence."""

from __future__ import annotations

import copy
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed.nn.functional as differentiable
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from accel_parallel import Accumulation, Bundle, DDPStrategy, GradientAccumulationPlugin
from accel_parallel.compilation import TorchDynamoPlugin, compile_model, is_compiled, uncompile
from accel_parallel.recompute import checkpoint_activations, is_checkpointed
from accel_parallel.sequence import context
from accel_parallel.sequence.attention import SequenceParallel
from accel_parallel.sequence.layout import SequenceKind
from accel_state import ConfigError, Process
from accel_state.testing import run_ranks

KINDS: tuple[SequenceKind, ...] = ("context", "ulysses")
VOCABULARY, WIDTH, HEADS = 11, 16, 4


class Attention(nn.Module):
    """Grouped queries with rotary embeddings."""

    def __init__(self, shared: int, is_causal: bool) -> None:
        super().__init__()
        self.shared, self.is_causal = shared, is_causal
        self.query = nn.Linear(WIDTH, WIDTH)
        self.rest = nn.Linear(WIDTH, 2 * shared * WIDTH // HEADS)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        query = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = self.rest(x).unflatten(-1, (2 * self.shared, -1)).transpose(1, 2).chunk(2, dim=1)
        angles = positions[:, None, :, None] / torch.tensor([1.0, 7.0], dtype=self.rest.weight.dtype)
        query, key = _turn(query, angles), _turn(key, angles)
        answer = functional.scaled_dot_product_attention(
            query, key, value, is_causal=self.is_causal, enable_gqa=self.shared < HEADS
        )
        return answer.transpose(1, 2).flatten(2)


def _turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class Block(nn.Module):
    def __init__(self, shared: int, is_causal: bool) -> None:
        super().__init__()
        self.attention = Attention(shared, is_causal)
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x), positions)
        return cast(torch.Tensor, x + self.mlp(x))


class Net(nn.Module):
    def __init__(self, *, shared: int = 2, is_causal: bool = True, recompute: str = "no") -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(shared, is_causal) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            if self.recompute == "no" or not self.training:
                x = block(x, position_ids)
            else:
                x = checkpoint(block, x, position_ids, use_reentrant=self.recompute == "reentrant")
        return cast(torch.Tensor, self.head(x))


def network(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def loss_sum(logits: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum")


def sequence_parallel(kind: SequenceKind) -> SequenceParallel:
    group = torch.distributed.group.WORLD
    assert group is not None
    return SequenceParallel(group, kind=kind)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def reference(length: int, options: dict[str, Any]) -> list[torch.Tensor]:
    """On one process: logits, loss and gradients of the whole sequence, the last label nowhere."""
    model, ids = network(**options), tokens(length)
    logits = model(ids, torch.arange(length).expand(2, -1))
    shifted = functional.pad(ids[:, 1:], (0, 1), value=-100) if options.get("is_causal", True) else ids
    loss = loss_sum(logits, shifted)
    loss.backward()
    return [logits.detach(), loss.detach(), *gradients(model)]


def train(kind: SequenceKind, length: int, options: dict[str, Any]) -> list[torch.Tensor]:
    """On a rank: the same from its part, put together by sums."""
    sequence, model, ids = sequence_parallel(kind), network(**options), tokens(length)
    sequence.attach(model)
    causal = options.get("is_causal", True)
    batch = sequence.shard({"input_ids": ids, "labels": ids}, causal=causal)
    logits = model(batch["input_ids"], batch["position_ids"])
    loss = loss_sum(logits, batch["shift_labels" if causal else "labels"])
    loss.backward()
    sums = [loss.detach(), *gradients(model)]
    for each in sums:
        torch.distributed.all_reduce(each)
    return [sequence.unshard(logits.detach(), length=length), *sums]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ranks", "length", "options"),
    [
        (2, 13, {}),  # padded
        (4, 16, {"shared": 1}),
        (2, 16, {"is_causal": False, "shared": 4}),
        (2, 16, {"recompute": "plain"}),
        (2, 16, {"recompute": "reentrant"}),
    ],
    ids=["padded", "four-ranks", "all-to-all", "recomputed", "recomputed-reentrant"],
)
def test_training_equals_one_process(kind: SequenceKind, ranks: int, length: int, options: dict[str, Any]) -> None:
    wanted = reference(length, {**options, "recompute": "no"})
    for found in run_ranks(train, ranks, kind, length, options):
        assert_same(found, wanted)


def train_with_windows(kind: SequenceKind) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """On a rank: one window of two micro-batches through DDP, by tokens; and the loss that all ranks put together."""
    sequence, inner = sequence_parallel(kind), network()
    sequence.attach(inner)
    strategy = DDPStrategy(Process.current())
    (model,) = strategy.prepare(Bundle((inner,))).models
    windows = Accumulation(GradientAccumulationPlugin(num_steps=2), strategy)
    windows.bind(inner.parameters())
    for seed, length in ((1, 13), (2, 9)):
        ids = tokens(length, seed)
        batch = sequence.shard({"input_ids": ids, "labels": ids})
        with windows.enter(None, remaining=None):
            loss = loss_sum(model(batch["input_ids"], batch["position_ids"]), batch["shift_labels"])
            strategy.backward(windows.scale_loss(loss, (batch["shift_labels"] != -100).sum()))
            windows.after_backward()
    by_windows = [each.clone() for each in gradients(inner)]
    inner.zero_grad()
    strategy.backward(weighted_mean(sequence, model, 13))
    return by_windows, gradients(inner)


def weighted_mean(sequence: SequenceParallel, model: nn.Module, length: int) -> torch.Tensor:
    """The mean over all tokens, on every rank, from each rank's own mean: gathered with gradients."""
    ids = tokens(length)
    batch = sequence.shard({"input_ids": ids, "labels": ids})
    logits = model(batch["input_ids"], batch["position_ids"])
    loss = functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    good = (batch["shift_labels"] != -100).sum()
    losses = differentiable.all_gather(loss, group=sequence.group)
    counts = differentiable.all_gather(good, group=sequence.group)
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count > 0)
    return cast(torch.Tensor, total / max(int(sum(counts)), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_token_losses_are_averaged_rightly(kind: SequenceKind) -> None:
    model = network()
    losses = []
    for seed, length in ((1, 13), (2, 9)):
        ids = tokens(length, seed)
        shifted = functional.pad(ids[:, 1:], (0, 1), value=-100)
        losses.append(loss_sum(model(ids, torch.arange(length).expand(2, -1)), shifted))
    first = torch.autograd.grad(losses[0] / 24, list(model.parameters()), retain_graph=True)
    both = torch.autograd.grad((losses[0] + losses[1]) / (24 + 16), list(model.parameters()))
    for by_windows, gathered in run_ranks(train_with_windows, 2, kind):
        assert_same(by_windows, list(both))
        assert_same(gathered, list(first))


class Stock(nn.Module):
    """torch's own layers, which reach attention by ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return cast(torch.Tensor, self.encoder(x, mask=mask, is_causal=mask is not None))


def stock() -> Stock:
    torch.manual_seed(0)
    return Stock().double()


def inputs(length: int) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def run_stock(kind: SequenceKind, is_causal: bool, evaluates: bool) -> torch.Tensor:
    sequence, model = sequence_parallel(kind), stock().train(not evaluates)
    sequence.attach(model)
    batch = sequence.shard({"inputs_embeds": inputs(8)}, causal=is_causal)
    size = batch["inputs_embeds"].shape[1]
    mask = nn.Transformer.generate_square_subsequent_mask(size, dtype=torch.float64) if is_causal else None
    with torch.set_grad_enabled(not evaluates):
        return sequence.unshard(model(batch["inputs_embeds"], mask)).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("evaluates", [True, False])
def test_layers_of_torch_are_caught_on_every_path(kind: SequenceKind, is_causal: bool, evaluates: bool) -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(8, dtype=torch.float64) if is_causal else None
    wanted = stock()(inputs(8), mask).detach()
    for found in run_ranks(run_stock, 2, kind, is_causal, evaluates):
        assert_same(found, wanted)


def cut_in_place(kind: SequenceKind) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    sequence, model, ids = sequence_parallel(kind), network(), tokens(16)
    sequence.attach(model)
    positions, spent = torch.arange(16).expand(2, -1).clone(), ids.t().clone()
    before, view = ids.clone(), ids[0]
    with sequence.context_parallel(
        buffers=[ids, positions, spent], buffer_seq_dims=[1, 1, 0], no_restore_buffers={spent}
    ):
        shapes = [tuple(each.shape) for each in (ids, positions, spent, view)]
        assert torch.equal(spent, ids.t())
        logits = model(ids, positions)
    assert torch.equal(ids, before)
    assert positions.shape == (2, 16)
    assert spent.shape == (8, 2)
    with pytest.raises(RuntimeError, match="on purpose"), sequence.context_parallel(buffers=[ids], buffer_seq_dims=[1]):
        raise RuntimeError("on purpose")
    assert torch.equal(ids, before)
    return shapes, sequence.unshard(logits).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_cut_for_a_block(kind: SequenceKind) -> None:
    wanted = reference(16, {})[0]
    for shapes, logits in run_ranks(cut_in_place, 2, kind):
        assert shapes == [(2, 8), (2, 8), (8, 2), (16,)]
        assert_same(logits, wanted)


def train_on_the_whole(kind: SequenceKind) -> list[torch.Tensor]:
    """On a rank: every rank computes the same loss from outputs that were put together."""
    sequence, inner, ids = sequence_parallel(kind), network(), tokens(14)
    sequence.attach(inner)
    (model,) = DDPStrategy(Process.current()).prepare(Bundle((inner,))).models
    batch = sequence.shard({"input_ids": ids})
    logits = sequence.unshard(model(batch["input_ids"], batch["position_ids"]), length=14)
    loss_sum(logits, functional.pad(ids[:, 1:], (0, 1), value=-100)).backward()
    return gradients(inner)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_over_the_whole_counts_once(kind: SequenceKind) -> None:
    for found in run_ranks(train_on_the_whole, 2, kind):
        assert_same(found, reference(14, {})[2:])


class Inline(nn.Module):
    """A block that calls attention itself, with no module of its own for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.first(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        answer = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return cast(torch.Tensor, x + self.second(answer.transpose(1, 2).flatten(2)))


def inline() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Inline(), Inline()).double()


def recompute_inline(kind: SequenceKind) -> list[torch.Tensor]:
    sequence, model = sequence_parallel(kind), inline()
    sequence.attach(model)
    checkpoint_activations(model, list(model.named_children()))
    model(sequence.shard({"inputs_embeds": inputs(8)})["inputs_embeds"]).square().sum().backward()
    for each in gradients(model):
        torch.distributed.all_reduce(each)
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_recomputed_whole_exchange_again(kind: SequenceKind) -> None:
    model = inline()
    model(inputs(8)).square().sum().backward()
    for found in run_ranks(recompute_inline, 2, kind):
        assert_same(found, gradients(model))


def train_in_shards(kind: SequenceKind) -> list[torch.Tensor]:
    """On a rank: parameters divided over the same ranks, blocks recomputed."""
    from torch.distributed.fsdp import fully_shard

    sequence, model, ids = sequence_parallel(kind), network(recompute="plain"), tokens(16)
    sequence.attach(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    batch = sequence.shard({"input_ids": ids, "labels": ids})
    loss_sum(model(batch["input_ids"], batch["position_ids"]), batch["shift_labels"]).backward()
    return [2 * cast(Any, gradient).full_tensor() for gradient in gradients(model)]  # averaged over two ranks


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_may_be_sharded_over_the_same_ranks(kind: SequenceKind) -> None:
    for found in run_ranks(train_in_shards, 2, kind):
        assert_same(found, reference(16, {})[2:])


def train_compiled(kind: SequenceKind) -> list[torch.Tensor]:
    sequence, model, ids = sequence_parallel(kind), network(), tokens(16)
    sequence.attach(model)
    compiled = torch.compile(model, backend="eager")
    batch = sequence.shard({"input_ids": ids, "labels": ids})
    loss_sum(compiled(batch["input_ids"], batch["position_ids"]), batch["shift_labels"]).backward()
    for each in gradients(model):
        torch.distributed.all_reduce(each)
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models_exchange_too(kind: SequenceKind) -> None:
    for found in run_ranks(train_compiled, 2, kind):
        assert_same(found, reference(16, {})[2:])


def train_compiled_and_recomputed(kind: SequenceKind) -> list[torch.Tensor]:
    sequence, model, ids = sequence_parallel(kind), network(), tokens(16)
    sequence.attach(model)
    undo = checkpoint_activations(model)
    with pytest.raises(ConfigError, match=r"`Net` was to be compiled as a whole.*use_regional_compilation=True"):
        compile_model(model, TorchDynamoPlugin(backend="aot_eager"))
    compile_model(model, TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=True))
    assert is_checkpointed(model.blocks[0])
    batch = sequence.shard({"input_ids": ids, "labels": ids})
    part, labels = (batch["input_ids"], batch["position_ids"]), batch["shift_labels"]
    loss_sum(model(*part), labels).backward()
    found = [gradient.clone() for gradient in gradients(model)]
    for each in found:
        torch.distributed.all_reduce(each)
    uncompile(model)
    assert not is_compiled(model)
    undo()
    model.zero_grad()
    loss_sum(model(*part), labels).backward()
    for gradient in gradients(model):
        torch.distributed.all_reduce(gradient)
    assert_same(gradients(model), found)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compiled_and_recomputed_exchange_too(kind: SequenceKind) -> None:
    for found in run_ranks(train_compiled_and_recomputed, 2, kind):
        assert_same(found, reference(16, {})[2:])


def attach_copy_detach() -> list[torch.Tensor]:
    """On a rank: a copy exchanges too, a model that was detached does not, nor another beside an attached one."""
    sequence, model, ids = sequence_parallel("context"), network(), tokens(16)
    beside = network()
    sequence.attach(model)
    twin = copy.deepcopy(model)
    batch = sequence.shard({"input_ids": ids})
    part = (batch["input_ids"], batch["position_ids"])
    answers = [sequence.unshard(each(*part).detach()) for each in (model, twin)]
    sequence.detach(model)
    sequence.detach(model)
    whole = (ids, torch.arange(16).expand(2, -1))
    answers += [each(*whole).detach() for each in (model, beside)]
    assert not any("forward" in module.__dict__ for module in model.modules())
    # An error inside a forward leaves nothing entered behind.
    with pytest.raises(IndexError):
        twin(batch["input_ids"] + VOCABULARY, batch["position_ids"])
    with pytest.raises(TypeError):
        twin()
    query = torch.zeros(1, 1, 3, 2)
    functional.scaled_dot_product_attention(query, query, query)
    return answers


def test_models_are_attached_copied_and_detached() -> None:
    wanted = reference(16, {})[0]
    for answers in run_ranks(attach_copy_detach, 2):
        for answer in answers:
            assert_same(answer, wanted)


class Odd(nn.Module):
    """Calls attention as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        key = options.pop("key", x)
        return functional.scaled_dot_product_attention(x * self.scale, key, key, **options)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x, x, x)


def refusals(kind: SequenceKind) -> list[str]:
    sequence = sequence_parallel(kind)
    odd, none, weighted = Odd(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Weighted()
    for model in (odd, none, weighted):
        sequence.attach(model)
    messages = []

    def refused(call: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            call(*args, **options)
        messages.append(str(caught.value))

    x = torch.randn(1, 2, 4, 4)
    refused(odd, x, is_causal=True)
    sequence.shard({"input_ids": tokens(8)})
    odd(x, is_causal=True)
    refused(odd, x[0])
    refused(odd, x, key=x[:, :, :3])
    refused(odd, x, attn_mask=torch.ones(4, 4).tril() > 0)
    refused(odd, x, attn_mask=torch.ones(4, 8).tril() > 0, is_causal=True)
    sequence.shard({"input_ids": tokens(7)})
    odd(x, is_causal=True)
    refused(odd, x)
    refused(none, torch.randn(1, 4, 4))
    refused(weighted, torch.randn(1, 4, 4))
    refused(sequence.attach, odd)
    ids = tokens(8)
    with pytest.raises(ConfigError) as caught, sequence.context_parallel(buffers=[ids], buffer_seq_dims=[]):
        pass
    messages.append(str(caught.value))
    with pytest.raises(ConfigError) as caught, sequence.context_parallel(
        buffers=[ids], buffer_seq_dims=[1], no_restore_buffers={ids.clone()}
    ):  # fmt: skip
        pass
    messages.append(str(caught.value))
    with pytest.raises(ConfigError) as caught, sequence.context_parallel(buffers=[ids[:, :7]], buffer_seq_dims=[1]):
        pass
    messages.append(str(caught.value))
    with pytest.raises(ConfigError) as caught, sequence.context_parallel(
        buffers=[torch.randn(2, 8, requires_grad=True)], buffer_seq_dims=[1]
    ):  # fmt: skip
        pass
    messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_be_wrong_is_refused(kind: SequenceKind) -> None:
    expected = [
        "no batch was cut to parts of that length",
        "queries of shape (2, 4, 4)",
        "keys of (1, 2, 3, 4)",
        "mask of shape (4, 4)",
        "Give one of them",
        "ends in padding",
        "No attention of `Sequential` was seen",
        "`need_weights=False`",
        "Odd is attached to a group already",
        "1 buffer(s) came with 0 `buffer_seq_dims`",
        "none of `buffers`",
        "7 tokens cannot be divided evenly",
        "requires gradients",
    ]
    for messages in run_ranks(refusals, 2, kind):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def single_group() -> str:
    group = torch.distributed.new_group([Process.current().topology.rank], use_local_synchronization=True)
    assert group is not None
    with pytest.raises(ConfigError) as caught:
        SequenceParallel(group, kind="context")
    odd_heads = nn.Sequential(nn.MultiheadAttention(3, 3))
    with pytest.raises(ConfigError, match=r"`0` has 3 head\(s\)"):
        sequence_parallel("ulysses").attach(odd_heads)
    return str(caught.value)


def test_a_group_of_one_and_heads_are_refused_at_once() -> None:
    assert all("group of 1 process(es)" in message for message in run_ranks(single_group, 2))


def run_under_autocast(kind: SequenceKind) -> tuple[list[torch.dtype], torch.Tensor]:
    sequence, model, ids = sequence_parallel(kind), network().float(), tokens(16)
    sequence.attach(model)
    batch = sequence.shard({"input_ids": ids})
    where, name = (context, "_all_gather") if kind == "context" else (torch.distributed, "all_to_all_single")
    with torch.autocast("cpu", dtype=torch.bfloat16), mock.patch.object(where, name, wraps=getattr(where, name)) as spy:
        logits = model(batch["input_ids"], batch["position_ids"]).detach()
    return [call.args[1].dtype for call in spy.call_args_list], sequence.unshard(logits)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_rounds_before_the_exchange(kind: SequenceKind) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = network().float()(tokens(16), torch.arange(16).expand(2, -1)).detach()
    for travelled, found in run_ranks(run_under_autocast, 2, kind):
        # Once a layer for keys and values; for heads once there and once back.
        assert travelled == [torch.bfloat16] * (2 if kind == "context" else 4)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2)
