"""Models of transformers, divided over ranks without a change, give what they give on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_parallel.pipeline import prepare_pippy
from accel_state import ConfigError
from accel_state.testing import run_ranks

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "pipeline_inference.py"
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
LONG: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64}


def build(kind: str) -> Any:
    import transformers as hf

    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    model: Any = {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=64)
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LONG, tie_word_embeddings=True)),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, max_position_embeddings=64)),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**LONG, num_local_experts=4, experts_implementation="eager")
        ),
        "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LONG, head_dim=8, sliding_window=4)),
        "deberta": lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
        ),
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**SMALL, "max_position_embeddings": 16, "num_hidden_layers": 2},
                vision_config={**SMALL, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        ),
    }[kind]()
    return model.double().eval()


def inputs(kind: str, rows: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * rows + length)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, -2:] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        given["decoder_input_ids"] = torch.randint(1, 64, (rows, length + 1), generator=generator)
    if kind == "clip":
        given["pixel_values"] = torch.rand(rows, 3, 32, 32, generator=generator, dtype=torch.float64)
    if kind not in ("bert", "clip", "deberta"):
        given["use_cache"] = False
    return given


def largest_difference(got: Any, expected: Any) -> float:
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    worst = 0.0
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
            worst = max(worst, float((got[name] - tensor).abs().max()))
    return worst


def divided(kinds: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        whole = build(kind)
        # Two towers are compared with each other, row by row: their batch cannot be divided.
        chunks = 1 if kind == "clip" else None
        example = inputs(kind, 4, 8)
        model = prepare_pippy(build(kind), example_kwargs=example, num_chunks=chunks, gather_output=True)
        worst = 0.0
        for rows, length in ((4, 8), (5, 8), (2, 11), (1, 4)):
            given = inputs(kind, rows, length)
            with torch.no_grad():
                expected = whole(**given)
            worst = max(worst, largest_difference(model(**given), expected))
        found[kind] = worst, model.split_points, model.stage_bytes
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kinds", "world_size"),
    [(("gpt2", "bert", "mixtral", "deberta", "clip"), 2), (("llama", "t5", "gemma3"), 3), (("llama", "t5"), 4)],
)
def test_every_model_gives_what_one_process_gives(kinds: tuple[str, ...], world_size: int) -> None:
    ranks = run_ranks(divided, world_size, kinds, timeout_s=500)
    for kind in kinds:
        total = sum(each.nbytes for each in build(kind).parameters())
        for worst, points, size in (found[kind] for found in ranks):
            assert worst < 1e-10, kind
            assert len(points) == world_size - 1
            assert size < 0.9 * total, (kind, size, total)


def refused() -> list[str]:
    found = []
    for kind, extra in (
        ("llama", {"use_cache": True}),
        ("mixtral", {"output_hidden_states": True}),
        ("llama", {"labels": inputs("llama", 4, 8)["input_ids"]}),
    ):
        with pytest.raises(ConfigError, match="") as caught:
            prepare_pippy(build(kind), example_kwargs=inputs(kind, 4, 8) | extra)
        found.append(str(caught.value))
    return found


@pytest.mark.timeout(300)
def test_outputs_that_no_rank_has_whole_are_refused() -> None:
    cache, hidden, labels = run_ranks(refused, 2, timeout_s=250)[1]
    assert "returns a DynamicCache at" in cache
    assert "Pass `use_cache=False`" in cache
    assert "of the 4 blocks of `MixtralForCausalLM` only 1 can begin one" in hidden
    assert "needs the output at `.hidden_states[" in hidden
    assert "tensor of shape () at `.loss`" in labels


@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_processes", [1, 3])
def test_the_example_gives_what_the_whole_model_gives(
    num_processes: int, accel_command: list[str], run_command: Callable[..., Any]
) -> None:
    launch = [*accel_command, "launch", "--cpu", "--num-processes", str(num_processes)]
    done = run_command([*launch, EXAMPLE, "--check"], timeout_s=200, env={"OMP_NUM_THREADS": "1"})
    assert "as on one process" in done.stdout
    assert f"stage {num_processes} of {num_processes} holds" in done.stdout
    assert "1 text(s): 30." in done.stdout
