"""Real models of transformers, offloaded: they generate what the resident model does, and adapters can be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from accel_bigmodel.offload.division import group_tensors
from accel_bigmodel.offload.hooks import units_of
from accel_bigmodel.offload.offloading import remove_hooks
from accel_bigmodel.offload.streaming import stream_tensors
from accel_bigmodel.stored import read_index
from accel_bigmodel.testing import FakeTransfers
from accel_state.errors import ConfigError

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=1))


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_ff=64, d_kv=8, num_layers=3, num_heads=4, decoder_start_token_id=0)
    )


MODELS = {each.__name__: each for each in (llama, gpt2, mixtral, t5)}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


TOKENS = torch.arange(2, 14).view(2, 6)
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(TOKENS)}


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    models: list[Any] = []
    yield models
    for model in models:
        for unit in units_of(model):
            unit.engine.close()


def offload(model: Any, folder: Path | None = None, *, num_slots: int = 3, only_frozen: bool = False) -> FakeTransfers:
    transfers = FakeTransfers()
    values: dict[str, Any] = {}
    if folder is not None:
        model.save_pretrained(folder, max_shard_size="20KB")
        values = dict(read_index(folder))
    tensors = [each for each in group_tensors(model) if each.places[0].is_parameter]
    if only_frozen:
        tensors = [each for each in tensors if not each.value.requires_grad]
    stream_tensors(model, tensors, values, transfers=transfers, num_slots=num_slots)
    return transfers


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("from_files", [False, True], ids=["host", "files"])
def test_generation_is_that_of_the_resident_model(
    tmp_path: Path, opened: list[Any], kind: str, from_files: bool
) -> None:
    expected = make(kind).generate(TOKENS, **GENERATE)
    model = make(kind)
    transfers = offload(model, tmp_path if from_files else None)
    opened.append(model)
    with transfers.watch():
        for _ in range(2):
            assert torch.equal(model.generate(TOKENS, **GENERATE), expected)
    assert transfers.peak_bytes <= units_of(model)[0].engine.budget_bytes
    if not from_files:
        twin = copy.deepcopy(model)
        del model
        assert torch.equal(twin.generate(TOKENS, **GENERATE), expected)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_next_block_is_on_its_way(kind: str) -> None:
    """From the second pass on, every unit is there when it is needed; the host waits for no copy at all.

    T5 needs its embedding for both halves, so what follows it at the end of a pass is known after two.
    """
    model = make(kind)
    transfers = offload(model)
    arguments: dict[str, Any] = {"input_ids": TOKENS}
    if kind == "t5":
        arguments["decoder_input_ids"] = TOKENS
    with torch.no_grad():
        for _ in range(2 if kind == "t5" else 1):
            model(**arguments)
    engine = units_of(model)[0].engine
    late: list[str] = []
    acquire = engine.acquire

    def watched(load: Any) -> torch.Tensor:
        if load.name not in engine.resident:
            late.append(load.name)
        return acquire(load)

    engine.acquire = watched  # type: ignore[method-assign]
    with torch.no_grad():
        for _ in range(3):
            model(**arguments)
    assert late == []
    assert transfers.host_waits == 0


def test_saving_an_offloaded_model_saves_its_weights(tmp_path: Path) -> None:
    expected = make("gpt2").state_dict()
    model = make("gpt2")
    offload(model)
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path, state_dict=state)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_are_trained_as_on_the_resident_model(checkpointed: bool) -> None:
    def train(offloaded: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = get_peft_model(
            make("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
        )
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        transfers = offload(model, only_frozen=True) if offloaded else None
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
        losses = []
        for _ in range(4):
            if transfers is None:
                loss = model(input_ids=TOKENS, labels=TOKENS).loss
                loss.backward()
            else:
                with transfers.watch():
                    loss = model(input_ids=TOKENS, labels=TOKENS).loss
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, {name: value for name, value in model.state_dict().items() if "lora_" in name}

    expected, right = train(offloaded=False)
    losses, weights = train(offloaded=True)
    assert losses == expected
    assert losses[-1] < losses[0]
    assert weights.keys() == right.keys()
    assert all(torch.equal(weights[name], right[name]) for name in right)


def test_a_compiled_model_generates_the_same() -> None:
    """A graph ends where weights come and go: blocks are compiled, once for all of them, and bringing is not."""
    with torch.no_grad():
        expected = make("llama")(TOKENS).logits
    model = make("llama")
    transfers = offload(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(TOKENS).logits, expected)
    assert transfers.host_waits == 0
    torch._dynamo.reset()


def test_adapters_that_come_after_offload_compute_where_the_weights_will_be() -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(4)
        found = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        return found.eval()

    model = make("llama")
    transfers = offload(model)
    late, plain = adapted(model), adapted(make("llama"))
    with torch.no_grad(), transfers.watch():
        assert torch.equal(late(TOKENS).logits, plain(TOKENS).logits)
    with pytest.raises(ConfigError, match="`remove_hooks` first"):
        late.merge_adapter()
    remove_hooks(late)
    assert torch.equal(late(TOKENS).logits, plain(TOKENS).logits)
    late.merge_adapter()


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_model_says_where_its_inputs_belong(kind: str) -> None:
    model = make(kind)
    offload(model)
    assert model.device == torch.device("cpu")
    assert torch.equal(TOKENS.to(model.device), TOKENS)
