"""Matrices divided by DeepSpeed's AutoTP: training, norms and whole states equal one process; the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from accel import Accelerator
from accel_parallel.deepspeed.building import adopt_group
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_parallel.deepspeed.tensor import TensorDivision, check_tensor_parallel
from accel_parallel.parallelism import ParallelismConfig
from accel_state.errors import ConfigError
from accel_state.process import Process, ProcessSettings
from accel_state.testing import run_ranks

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed lives in an environment of its own")
transformers = pytest.importorskip("transformers")

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 49, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": True,
}  # fmt: skip
"""The vocabulary and the width between cannot be divided evenly."""
RATE = 0.1
STEPS = 3
CLIP = 1.0
TOLERANCE = 2e-6
"""Largest difference of a weight after three clipped steps of SGD at a rate of 0.1, in float32."""


def network(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "qwen3":
        config = transformers.Qwen3Config(**SIZES, head_dim=8)
    elif kind == "phi3":
        config = transformers.Phi3Config(**{**SIZES, "intermediate_size": 48}, pad_token_id=0, eos_token_id=0)
    elif kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied")
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


FUSED = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [".*gate_up_proj\\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
        {"patterns": [".*down_proj\\.weight$"], "partition_type": "row"},
    ],
}
"""Two matrices in one, of which every rank has a part of each."""


def batch_of(step: int, replica: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + replica)
    ids = torch.randint(1, VOCABULARY, (2, 16), generator=generator)
    return {"input_ids": ids, "labels": ids}


def accelerator_of(stage: Any, config: ParallelismConfig, **arguments: Any) -> Accelerator:
    """Models are built whole: AutoTP divides no others."""
    plugin = DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=False if stage == 3 else None, **arguments)
    return Accelerator(cpu=True, deepspeed_plugin=plugin, parallelism_config=config)


def settings(config: ParallelismConfig) -> ProcessSettings:
    return ProcessSettings(device="cpu", mesh=config.mesh_shape())


def train(config: ParallelismConfig, asked: list[tuple[str, int]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Losses, the last norm, whole weights in the end, and the shape of one rank's logits."""
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for kind, stage in asked:
        accelerator = accelerator_of(stage, config)
        module = network(kind)
        model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=RATE))
        losses, norm, shape = [], torch.zeros(()), torch.Size()
        for step in range(STEPS):
            batch = batch_of(step, accelerator.process.topology.data_rank)
            if config.sp_size > 1:
                part = accelerator.shard_sequence(batch)
                labels = part.pop("shift_labels")
                logits = model(**part).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                accelerator.backward(loss, num_items=(labels != -100).sum())
                loss = loss / (labels != -100).sum()
            else:
                output = model(**batch, use_cache=False)
                loss, shape = output.loss, output.logits.shape
                accelerator.backward(loss)
            losses.append(loss.item())
            norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                accelerator.get_state_dict(model)  # what comes after must not notice
        whole = {name: tensor.clone() for name, tensor in accelerator.get_state_dict(model).items()}
        found[kind, stage] = losses, float(norm), whole, shape
        accelerator.free_memory()
    return found


def train_alone(kind: str, replicas: int) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    model, losses, norm = network(kind), [], 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for replica in range(replicas):
            loss = model(**batch_of(step, replica)).loss
            (loss / replicas).backward()
            losses.append(loss.item())
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
    return losses[::replicas], norm, dict(model.state_dict())


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("sizes", "asked"),
    [
        (
            {"tp_size": 2},
            [("llama", 0), ("llama", 1), ("llama", 2), ("llama", 3), ("tied", 2), ("qwen3", 0), ("opt", 1)],
        ),
        ({"tp_size": 2, "dp_shard_size": 2}, [("llama", 0), ("llama", 2), ("llama", 3)]),
        ({"tp_size": 2, "sp_size": 2}, [("llama", 1), ("llama", 3)]),
    ],
    ids=["tp", "tp x dp", "tp x sp"],
)
def test_divided_matrices_train_as_one_process(sizes: dict[str, int], asked: list[tuple[str, int]]) -> None:
    backend: dict[str, Any] = {"sp_backend": "deepspeed"} if "sp_size" in sizes else {}
    config = ParallelismConfig(**sizes, **backend)
    found = run_ranks(train, config.total_size, config, asked, settings=settings(config), timeout_s=300)
    for kind, stage in asked:
        losses, norm, whole = train_alone(kind, config.dp_shard_size)
        for rank in range(config.total_size):
            ours = found[rank][kind, stage]
            if rank < 2 and config.sp_size == 1:
                assert ours[0] == pytest.approx(losses, abs=1e-5), (kind, stage)
                assert ours[3] == (2, 16, VOCABULARY), (kind, stage)
            assert ours[1] == pytest.approx(norm, rel=1e-5), (kind, stage)
        state = found[0][kind, stage][2]
        assert state.keys() == whole.keys()
        assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in whole.items()}
        worst = max(float((state[name] - whole[name]).abs().max()) for name in whole)
        assert worst < TOLERANCE, (kind, stage, worst)


def states_of_adam(kind: str, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    """First moments after a step, put together from the parts of the ranks."""
    from deepspeed.utils import safe_get_full_optimizer_state

    adopt_group(Process.current())
    model = network(kind)
    section: dict[str, Any] = {"autotp_size": 2, "vocab_parallel_lm_head": False}
    if kind == "phi3":
        section["partition_config"] = FUSED
    config = {
        "train_micro_batch_size_per_gpu": 2, "managed_gradient_accumulation": False, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "tensor_parallel": section,
    }  # fmt: skip
    check_tensor_parallel(model, section)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    division = TensorDivision(model)
    engine.backward(engine(**batch_of(0, 0), use_cache=False).loss, scale_wrt_gas=False)
    engine.step()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        whole = division.gather(parameter, moment)
        assert whole.shape == division.shape_of(parameter)
        assert torch.equal(division.cut(parameter, whole), moment)
        found[name] = {"exp_avg": whole}
    engine.destroy()
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "stage"), [("llama", 2), ("phi3", 1), ("phi3", 3)])
def test_states_of_optimizers_are_put_together(kind: str, stage: int) -> None:
    found = run_ranks(states_of_adam, 2, kind, stage, timeout_s=200)
    model = network(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model(**batch_of(0, 0)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        for each in found:
            torch.testing.assert_close(
                each[name]["exp_avg"], optimizer.state[parameter]["exp_avg"], atol=1e-6, rtol=0, msg=name
            )


def refusal(call: Any) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def backward_under_dropout(seeds: list[int], p: float) -> str:
    config = ParallelismConfig(tp_size=2)
    module = network("opt")
    for each in module.modules():
        if hasattr(each, "dropout") and isinstance(each.dropout, float):
            each.dropout = p
    accelerator = accelerator_of(2, config)
    model, _ = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=RATE))
    torch.manual_seed(seeds[dist.get_rank()])
    loss = model(**batch_of(0, 0), use_cache=False).loss
    message = refusal(lambda: accelerator.backward(loss))
    accelerator.free_memory()
    return message


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seeds", "p", "words"), [
    ([1, 2], 0.3, "which every tensor-parallel rank has whole, differ from rank to rank"),
    ([1, 1], 0.3, "nothing was refused"), ([1, 2], 0.0, "nothing was refused"),
])  # fmt: skip
def test_copies_that_would_part_are_refused(seeds: list[int], p: float, words: str) -> None:
    config = ParallelismConfig(tp_size=2)
    for message in run_ranks(backward_under_dropout, 2, seeds, p, settings=settings(config), timeout_s=200):
        assert words in message


def refusals() -> list[str]:
    adopt_group(Process.current())
    two = {"autotp_size": 2}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with deepspeed.zero.Init(
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    ):
        divided = nn.Linear(4, 4)
    found = [
        refusal(lambda: check_tensor_parallel(gpt2, two)),
        refusal(lambda: check_tensor_parallel(nn.Linear(2, 2), two)),
        refusal(lambda: check_tensor_parallel(network("phi3"), two)),
        refusal(lambda: check_tensor_parallel(network("phi3"), {**two, "partition_config": FUSED})),
        refusal(lambda: check_tensor_parallel(divided, two)),
        refusal(lambda: check_tensor_parallel(network(), {})),
    ]
    from deepspeed.utils import groups

    groups._WORLD_GROUP = None
    groups._init_tp_mesh_device(tensor_model_parallel_size=2)  # as an engine does
    return [
        *found,
        refusal(lambda: check_tensor_parallel(network(), two)),
        refusal(lambda: check_tensor_parallel(network(), {})),
        refusal(lambda: check_tensor_parallel(network(), {"autotp_size": 4})),
    ]


@pytest.mark.timeout(300)
def test_what_cannot_be_divided_is_refused() -> None:
    expected = [
        "does not know how to divide `GPT2LMHeadModel`", "does not know how to divide `Linear`",
        "unsupported partition style", "nothing was refused", "was divided while it was built", "nothing was refused",
        "nothing was refused", "trained with `autotp_size=2` before", "`autotp_size=4` would be taken for 2",
    ]  # fmt: skip
    for messages in run_ranks(refusals, 2, timeout_s=200):
        for message, words in zip(messages, expected, strict=True):
            assert words in message
