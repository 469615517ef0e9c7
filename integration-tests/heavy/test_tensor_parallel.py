"""Models of transformers divide by the plans that they bring, and train as on one process, in float64 to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from accel_parallel.tensor.apply import apply_tensor_parallel, audit_replicas
from accel_parallel.tensor.loss import loss_parallel
from accel_parallel.tensor.plan import plan_tensor_parallel
from accel_state.errors import ConfigError
from accel_state.testing import run_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama, tied": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "biases": ("Qwen2Config", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
    "norms in heads": ("Qwen3Config", {"num_key_value_heads": 4, "head_dim": 16}),
    "scaled embedding": ("Gemma3TextConfig", {"num_key_value_heads": 4, "head_dim": 16}),
    "gathered inside": ("Phi3Config", {"num_key_value_heads": 4}),
    "norms over heads": ("Olmo2Config", {"num_key_value_heads": 4}),
    "fused by head": ("GPTNeoXConfig", {}),
}


def build(kind: str) -> Any:
    import transformers  # type: ignore[import-not-found, unused-ignore]

    transformers.logging.set_verbosity_error()
    name, options = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases begin all alike
                parameter.normal_(1.0, 0.1)
    return model


def full(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: Any, rows: slice, average: Any = None, after_first: Any = None) -> list[torch.Tensor]:
    """Losses, gradients of the first step, norms, and parameters after ten steps."""
    found: list[torch.Tensor] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(10):
        tokens = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        with loss_parallel():
            logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        if step == 0:
            found += [full(parameter.grad) for parameter in model.parameters()]
            if after_first is not None:
                after_first()
        found.append(full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        total = loss.detach().clone()
        if average is not None:
            dist.all_reduce(total, group=average.get_group())
            total /= average.size()
        found.append(total)
        optimizer.step()
    return found + [full(parameter) for parameter in model.parameters()]


def compare(kind: str, shards: int, divided_loss: bool) -> float:
    expected = train(build(kind), slice(None))
    root = init_device_mesh("cpu", (shards, dist.get_world_size() // shards), mesh_dim_names=("shard", "tp"))
    model = build(kind)
    plan = plan_tensor_parallel(model, tp_size=root["tp"].size(), loss_parallel=divided_loss)
    apply_tensor_parallel(model, plan, root["tp"])
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    place = slice(None)
    if shards > 1:
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=root["shard"])
        fully_shard(model, mesh=root["shard"])
        size = 4 // shards
        place = slice(root["shard"].get_local_rank() * size, (root["shard"].get_local_rank() + 1) * size)
    found = train(model, place, root["shard"], lambda: audit_replicas(model, plan, root["tp"]))
    return max(float((ours - wanted).abs().max()) for ours, wanted in zip(found, expected, strict=True))


def compare_all(cases: list[tuple[str, int, bool]]) -> list[float]:
    return [compare(*case) for case in cases]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, [(kind, 1, kind in ("llama", "biases", "gathered inside")) for kind in KINDS]),
        (4, [("llama", 1, False), ("llama, tied", 2, True), ("biases", 2, False), ("norms in heads", 2, False)]),
    ],
    ids=["two", "four"],
)
def test_plans_of_transformers_are_exact(world_size: int, cases: list[tuple[str, int, bool]]) -> None:
    for found in run_ranks(compare_all, world_size, cases, timeout_s=110):
        bounds = [1e-5 if case[0] == "scaled embedding" else 1e-10 for case in cases]  # its norms sum in float32
        pairs = zip(cases, found, bounds, strict=True)
        assert not {case: apart for case, apart, bound in pairs if not apart < bound}


def test_a_loss_inside_the_model() -> None:
    assert max(run_ranks(inside, 2)) < 1e-6  # the model computes it in float32


def inside() -> float:
    tokens = torch.arange(16).view(2, 8)
    expected = build("llama")(input_ids=tokens, labels=tokens).loss
    mesh = init_device_mesh("cpu", (2,))
    model = build("llama")
    apply_tensor_parallel(model, plan_tensor_parallel(model, tp_size=2, loss_parallel=True), mesh)
    with loss_parallel():
        found = model(input_ids=tokens, labels=tokens).loss
    found.backward()
    return abs(float(found) - float(expected))


@pytest.mark.parametrize(
    ("kind", "tp_size", "message"),
    [
        ("llama", 3, "`tp_size=3` does not divide `vocab_size=64`.*Set `tp_size` to 2 or 4;"),
        ("llama", 8, "`tp_size=8` does not divide `num_key_value_heads=4`.*Set `tp_size` to 2 or 4;"),
    ],
)
def test_sizes_are_refused_before_anything_changes(kind: str, tp_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_tensor_parallel(build(kind), tp_size=tp_size)


def test_experts_are_refused_by_name() -> None:
    import transformers  # type: ignore[import-not-found, unused-ignore]

    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_key_value_heads=4))
    with pytest.raises(ConfigError, match=r"`model.layers.0.mlp.experts.* which divides a mixture of experts"):
        plan_tensor_parallel(model, tp_size=2)
