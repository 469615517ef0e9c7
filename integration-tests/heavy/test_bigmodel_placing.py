"""Device maps of models of transformers, tiny and without values: what stays whole, what is tied, what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from accel_bigmodel import find_tied_parameters, init_empty_weights, total_size_bytes  # noqa: E402
from accel_bigmodel.kv_cache import kv_cache_bytes_per_layer  # noqa: E402
from accel_bigmodel.placing import (  # noqa: E402
    Workload,
    census,
    check_device_map,
    explain_device_map,
    get_balanced_memory,
    infer_auto_device_map,
    plan_model,
)
from accel_bigmodel.plan_command import main  # noqa: E402

pytestmark = pytest.mark.heavy


def llama() -> Any:
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(
        vocab_size=256, n_embd=32, n_layer=12, n_head=4, n_positions=64, architectures=["GPT2LMHeadModel"]
    )


def mixtral() -> Any:
    return transformers.MixtralForCausalLM, transformers.MixtralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip


def t5() -> Any:
    return transformers.T5ForConditionalGeneration, transformers.T5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=6, num_decoder_layers=6, num_heads=4,
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip


MODELS = {
    "llama": (llama, "LlamaDecoderLayer", 12),
    "gpt2": (gpt2, "GPT2Block", 12),
    "mixtral": (mixtral, "MixtralDecoderLayer", 12),
    "t5": (t5, "T5Block", 12),
}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str, int]:
    make, block, count = MODELS[request.param]
    return build(make), block, count


def build(make: Callable[[], Any]) -> nn.Module:
    kind, config = make()
    with init_empty_weights():
        model: nn.Module = kind(config)
    return model


def budgets(model: nn.Module, share: float) -> dict[int | str, int | str]:
    """Two devices that hold `share` of the model together, and a host with room for half of it."""
    total = total_size_bytes(model)
    return {0: int(total * share * 0.6), 1: int(total * share * 0.4), "cpu": total // 2}


def test_blocks_stay_whole_and_bytes_are_those_of_the_model(case: tuple[nn.Module, str, int]) -> None:
    model, block, count = case
    chain = census(model)
    assert [layer.kind for layer in chain.layers if layer.is_block] == [block] * count
    assert chain.total_bytes == total_size_bytes(model)
    assert census(model, dtype="bf16").total_bytes == total_size_bytes(model, dtype=torch.bfloat16)
    assert sorted(map(sorted, chain.ties)) == sorted(map(sorted, find_tied_parameters(model)))


@pytest.mark.parametrize("share", [0.75, 0.9, 2.5])
@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_maps_hold_within_their_budgets(case: tuple[nn.Module, str, int], share: float, strategy: Any) -> None:
    model, _, _ = case
    memory = budgets(model, share)
    for workload in (None, Workload(batch_size=1, sequence_length=4)):
        found = infer_auto_device_map(model, memory, strategy=strategy, workload=workload)
        check_device_map(model, found, max_memory=memory, workload=workload)
        places = explain_device_map(model, found, memory, workload=workload).to_dict()["places"]
        assert all(place["budget_bytes"] is None or place["used_bytes"] <= place["budget_bytes"] for place in places)
        auto = plan_model(model, memory, workload=workload).prediction.seconds
        assert auto <= plan_model(model, memory, strategy=strategy, workload=workload).prediction.seconds * (1 + 1e-9)


def test_tied_embeddings_and_heads_lie_together() -> None:
    for make in (gpt2, t5):
        model = build(make)
        found = infer_auto_device_map(model, budgets(model, 0.9), clean_result=False)
        for group in find_tied_parameters(model):
            holders = {found[name.rpartition(".")[0]] for name in group}
            assert len(holders) == 1


def test_blocks_lie_in_the_order_in_which_they_run(case: tuple[nn.Module, str, int]) -> None:
    model, _, _ = case
    plan = plan_model(model, budgets(model, 0.9))
    blocks = [plan.problem.places.index(plan.place_of(n)) for n, each in enumerate(plan.chain.layers) if each.is_block]
    assert all(first <= second for first, second in pairwise(blocks))
    assert len(set(blocks)) > 1


def test_the_kv_cache_is_with_the_blocks_of_the_decoder(case: tuple[nn.Module, str, int]) -> None:
    model, _, _ = case
    work = Workload(batch_size=2, sequence_length=16, dtype="fp16")
    expected = kv_cache_bytes_per_layer(model.config, batch_size=2, length=16, dtype=torch.float16)
    plan = plan_model(model, {0: "1GB"}, workload=work)
    blocks = [number for number, layer in enumerate(plan.chain.layers) if layer.is_block]
    assert [plan.problem.kv_bytes[number] for number in blocks[-len(expected) :]] == expected
    assert sum(plan.problem.kv_bytes) == sum(expected) > 0


def test_a_token_visits_some_of_the_experts() -> None:
    block = next(layer for layer in census(build(mixtral)).layers if layer.is_block)
    experts = 4 * 3 * 32 * 64
    dense = 2 * 32 * 32 + 2 * 32 * 16 + 4 * 32
    assert block.matrix_elements == dense + experts / 2


def test_balanced_memory_splits_a_model_in_two() -> None:
    model = build(llama)
    cut = get_balanced_memory(model, {0: "1GB", 1: "1GB"})
    found = infer_auto_device_map(model, cut, strategy="sequential", clean_result=False)
    layers = [place for name, place in found.items() if ".layers." in name]
    assert layers == [0] * 6 + [1] * 6


def test_the_command_plans_from_a_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, config = llama()
    config.save_pretrained(tmp_path)
    words = ["--memory", "0=250KiB,cpu=1GiB", "--batch-size", "1", "--sequence-length", "8", "--dtype", "bf16"]
    assert main([str(tmp_path), *words, "--map-output", str(tmp_path / "map.json")]) == 0
    out = capsys.readouterr().out
    assert "in bfloat16" in out
    assert "not counted" not in out
    device_map = json.loads((tmp_path / "map.json").read_text())
    check_device_map(build(llama), device_map)
    assert set(device_map.values()) <= {0, "cpu"}
