"""Tiny models of transformers on parts of sequences: logits, losses and gradients equal one process with the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel_parallel.sequence.attention import SequenceParallel
from accel_parallel.sequence.layout import IGNORED_LABEL, SequenceKind
from accel_state import ConfigError
from accel_state.testing import run_ranks

KINDS: tuple[SequenceKind, ...] = ("context", "ulysses")
VOCABULARY = 32
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip


def config(name: str) -> Any:
    import transformers

    if name == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    kinds = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
    }
    extra: dict[str, Any] = {"head_dim": 8} if name in ("qwen3", "mistral") else {}
    if name == "mistral":
        extra["sliding_window"] = None
    return kinds[name](**SIZES, **extra)


def network(name: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name), attn_implementation="sdpa", **options)
    return model.double().train()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def batch_of(length: int, real: int | None) -> dict[str, torch.Tensor]:
    """A batch whose second row ends in padding after `real` tokens, with the mask of a tokenizer; ``None``: none."""
    ids = tokens(length)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if real is not None:
        batch["attention_mask"] = (torch.arange(length) < torch.tensor([[length], [real]])).long()
        batch["labels"][batch["attention_mask"] == 0] = IGNORED_LABEL
    return batch


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def loss_of(logits: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum")


def reference(name: str, length: int, real: int | None) -> list[torch.Tensor]:
    model, batch = network(name), batch_of(length, real)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    loss = loss_of(logits[:, :-1], labels[:, 1:])
    loss.backward()
    return [logits.detach(), loss.detach(), *gradients(model)]


Case = tuple[str, int, "int | None", "bool | None"]
"""Model, length of the sequence, real tokens of a row that is padded, and the form of its checkpoints, if any."""

CASES: dict[int, list[Case]] = {
    2: [
        ("llama", 16, None, None),
        ("llama", 16, 5, None),
        ("llama", 15, 9, False),
        ("llama", 16, None, True),
        ("gpt2", 16, None, False),
        ("qwen2", 13, None, None),
        ("qwen3", 16, None, None),
        ("mistral", 16, None, None),
    ],
    4: [("llama", 21, None, None), ("gpt2", 16, None, None)],
}
"""By number of ranks. One world runs all of its cases, since each rank imports transformers first."""


def train(kind: SequenceKind, cases: list[Case]) -> list[list[torch.Tensor]]:
    """On a rank."""
    group = torch.distributed.group.WORLD
    assert group is not None
    sequence, results = SequenceParallel(group, kind=kind), []
    for name, length, real, reentrant in cases:
        model = network(name)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        sequence.attach(model)
        batch = sequence.shard(batch_of(length, real))
        output = model(**batch)
        logits = output.logits
        loss = loss_of(logits, batch["shift_labels"])
        mean = loss.detach() / (batch["shift_labels"] != IGNORED_LABEL).sum()
        torch.testing.assert_close(output.loss.double(), mean, rtol=1e-5, atol=0)  # computed in float32 by the model
        loss.backward()
        sums = [loss.detach(), *gradients(model)]
        for each in sums:
            torch.distributed.all_reduce(each)
        results.append([sequence.unshard(logits.detach(), length=length), *sums])
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", CASES)
def test_training_equals_one_process(kind: SequenceKind, ranks: int) -> None:
    wanted = [reference(name, length, real) for name, length, real, _ in CASES[ranks]]
    for results in run_ranks(train, ranks, kind, CASES[ranks], timeout_s=110):
        for case, found, expected in zip(CASES[ranks], results, wanted, strict=True):
            _, length, real, _ = case
            for row, end in ((0, length), (1, real or length)):  # what padding itself gives is nobody's business
                torch.testing.assert_close(found[0][row, :end], expected[0][row, :end], rtol=0, atol=1e-10)
            torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=1e-10)


def evaluate_with_the_models_loss(kind: SequenceKind) -> list[torch.Tensor]:
    """On a rank: positions and cache settings are left to us; the loss is the model's own, as a sum."""
    group = torch.distributed.group.WORLD
    assert group is not None
    sequence, model = SequenceParallel(group, kind=kind), network("llama").eval()
    sequence.attach(model)
    batch = sequence.shard(batch_of(16, None))
    with torch.no_grad():
        output = model(batch["input_ids"])
        loss = model.loss_function(
            logits=output.logits, labels=None, shift_labels=batch["shift_labels"], vocab_size=VOCABULARY,
            num_items_in_batch=torch.tensor(1),
        )  # fmt: skip
        by_model = model(**batch, num_items_in_batch=torch.tensor(1)).loss
        assert torch.equal(by_model, loss)
    torch.distributed.all_reduce(loss)
    return [sequence.unshard(output.logits), loss]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_needs_no_more_than_tokens(kind: SequenceKind) -> None:
    model, batch = network("llama").eval(), batch_of(16, None)
    with torch.no_grad():
        output = model(**batch, num_items_in_batch=torch.tensor(1))
    for logits, loss in run_ranks(evaluate_with_the_models_loss, 2, kind):
        torch.testing.assert_close(logits, output.logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(loss, output.loss, rtol=1e-6, atol=0)  # computed in float32 by the model


def run_with_a_whole_mask(kind: SequenceKind) -> torch.Tensor:
    group = torch.distributed.group.WORLD
    assert group is not None
    sequence, model = SequenceParallel(group, kind=kind), network("llama")
    sequence.attach(model)
    batch = sequence.shard({"input_ids": tokens(16), "attention_mask": left_padded_mask()})
    return sequence.unshard(model(**batch).logits.detach())


def left_padded_mask() -> torch.Tensor:
    """Causal, without the first three tokens; these see themselves."""
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    allowed[:, :3] = False
    return (allowed | torch.eye(16, dtype=torch.bool)).expand(2, 1, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_any_mask_that_covers_the_whole_is_taken(kind: SequenceKind) -> None:
    wanted = network("llama")(input_ids=tokens(16), attention_mask=left_padded_mask()).logits.detach()
    for found in run_ranks(run_with_a_whole_mask, 2, kind):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def call_wrongly(kind: SequenceKind) -> list[str]:
    import transformers

    group = torch.distributed.group.WORLD
    assert group is not None
    sequence, model = SequenceParallel(group, kind=kind), network("llama")
    sequence.attach(model)
    batch = sequence.shard({"input_ids": tokens(16)})
    ids = batch["input_ids"]
    left = torch.ones(2, 16, dtype=torch.long)
    left[1, :9] = 0
    bert = transformers.BertModel(
        transformers.BertConfig(**{**SIZES, "attn_implementation": "sdpa"}), add_pooling_layer=False
    )
    sequence.attach(bert)
    messages = []
    right = torch.ones(2, 16, dtype=torch.long)
    right[1, 9:] = 0
    for call in (
        lambda: model(ids, past_key_values=transformers.DynamicCache()),
        lambda: model(ids, use_cache=True),
        lambda: model.eval().generate(ids, max_new_tokens=2),
        lambda: model(ids, labels=ids),
        lambda: model(ids, attention_mask=sequence.layout.take(left, dim=1)),
        lambda: bert(ids, attention_mask=sequence.layout.take(right, dim=1)),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_would_be_wrong_are_refused(kind: SequenceKind) -> None:
    expected = ["cache", "`use_cache=True`", "cache", "`labels` while", "padding before tokens", "ends in padding"]
    for messages in run_ranks(call_wrongly, 2, kind):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def attach_wrongly() -> list[str]:
    import transformers

    group = torch.distributed.group.WORLD
    assert group is not None
    sequence = SequenceParallel(group, kind="ulysses")

    def model(implementation: str = "sdpa", **options: Any) -> Any:
        chosen = transformers.Qwen2Config(**{**SIZES, **options})
        return transformers.AutoModelForCausalLM.from_config(chosen, attn_implementation=implementation)

    messages = []
    for build in (
        lambda: model("eager"),
        lambda: model(use_sliding_window=True, sliding_window=4, max_window_layers=0),
        lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4)),
        lambda: model(num_attention_heads=1, num_key_value_heads=1),
        lambda: model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
        lambda: transformers.BartModel(transformers.BartConfig(**BART)),
        lambda: transformers.BartForCausalLM(transformers.BartConfig(**BART, is_encoder_decoder=False)),
    ):
        with pytest.raises(ConfigError) as caught:
            sequence.attach(build())
        messages.append(str(caught.value))
    return messages


def test_models_that_cannot_be_divided_are_refused_at_once() -> None:
    expected = [
        "attn_implementation='eager'", "sliding_attention", "sliding", "has 1 head(s)", "rope_type='dynamic'",
        "counts positions from 2 on", "`is_encoder_decoder=True`", "takes no `position_ids`",
    ]  # fmt: skip
    for messages in run_ranks(attach_wrongly, 2):
        for message, part in zip(messages, expected, strict=True):
            assert part in message
