"""Models of transformers are compiled by their layers once, whatever their number, and recompute them exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from accel_parallel.compilation import TorchDynamoPlugin, compile_model, compile_regions, uncompile
from accel_parallel.recompute import checkpoint_activations
from accel_state.blocks import find_blocks
from accel_state.errors import ConfigError

LAYERS = 24


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def llama(layers: int = LAYERS, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().train()


def tokens(length: int = 8) -> torch.Tensor:
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))


def step(model: Any, **options: Any) -> list[torch.Tensor]:
    """The loss and all gradients."""
    torch.manual_seed(2)  # dropout
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens(), **options).loss
    loss.backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor], atol: float = 1e-10) -> None:
    assert len(found) == len(wanted) > 1
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_the_layers_are_found() -> None:
    assert [name for name, _ in find_blocks(llama())] == [f"model.layers.{number}" for number in range(LAYERS)]
    with torch.device("meta"):
        config = T5Config(num_layers=2, num_decoder_layers=3, d_model=16, d_ff=32, num_heads=2, d_kv=8, vocab_size=64)
        model = T5ForConditionalGeneration(config)
    names = [name for name, _ in find_blocks(model)]
    assert names == ["encoder.block.0", "encoder.block.1", *(f"decoder.block.{number}" for number in range(3))]


def test_24_layers_are_compiled_once() -> None:
    plain, model, backend = llama(), llama(), Counting()
    compile_regions(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert_close(step(model, use_cache=False), step(plain, use_cache=False))
    assert backend.graphs == 1


def test_a_cache_of_keys_and_values_is_no_storm_of_compilations() -> None:
    model, backend = llama(), Counting()
    plain = copy.deepcopy(model)
    compile_regions(model, backend=backend)
    model.eval()
    plain.eval()
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **given), plain.generate(tokens(), **given))
    assert backend.graphs == 0
    model.train()
    with pytest.warns(UserWarning, match="`LlamaDecoderLayer` were given a cache of keys and values in training"):
        step(model, use_cache=True)
    assert backend.graphs == 0


def test_recomputing_keeps_gradients_and_needs_no_setting_of_the_cache() -> None:
    plain, model = llama(attention_dropout=0.5), llama(attention_dropout=0.5)
    undo = checkpoint_activations(model)
    wanted = step(plain, use_cache=False)
    with pytest.warns(UserWarning, match="which stays empty"):
        assert_close(step(model, use_cache=True), wanted)
    undo()
    assert_close(step(model, use_cache=False), wanted)


def test_recomputing_twice_is_refused_and_named() -> None:
    model = llama(layers=2)
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.24
    getattr(model, f"{switch}_checkpointing_enable")()
    with pytest.raises(ConfigError, match="checkpointed twice: the model does so itself"):
        checkpoint_activations(model)
    getattr(model, f"{switch}_checkpointing_disable")()
    checkpoint_activations(model)


def test_recomputing_inside_what_is_compiled() -> None:
    plain, model, backend = llama(), llama(), Counting()
    checkpoint_activations(model)
    compile_regions(model, backend=backend, fullgraph=True)
    with pytest.warns(UserWarning, match="which stays empty"):
        found = step(model, use_cache=True)
    assert_close(found, step(plain, use_cache=False))
    assert backend.graphs == 1


@pytest.mark.parametrize("regional", [False, True])
def test_inductor_is_exact(regional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # by inductor, into the environment of its process
    monkeypatch.setenv(written, "")
    monkeypatch.delenv(written)
    plain, model = llama(layers=2), llama(layers=2)
    with torch._inductor.config.patch(compile_threads=1):
        compile_model(model, TorchDynamoPlugin(use_regional_compilation=regional))
        # Llama computes its norms and its loss in float32, whatever its weights are.
        assert_close(step(model, use_cache=False), step(plain, use_cache=False), atol=1e-6)
    uncompile(model)
    assert list(model.state_dict()) == list(plain.state_dict())
