"""Weights that `accel checkpoint consolidate` takes out of a checkpoint are those that `from_pretrained` reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accel import Accelerator, FullyShardedDataParallelPlugin
from accel_parallel.checkpoint_commands import main
from accel_state.testing import run_ranks


def build() -> Any:
    import transformers  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def save(root: str) -> None:
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin())
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    rows = torch.arange(16).view(2, 8)
    accelerator.backward(model(input_ids=rows, labels=rows).loss)
    optimizer.step()
    accelerator.save_state(f"{root}/checkpoint")
    accelerator.unwrap_model(model).save_pretrained(
        f"{root}/expected",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.end_training()


@pytest.mark.parametrize("limit", ["5GB", "3kB"])
def test_from_pretrained_reads_what_was_trained(limit: str, tmp_path: Path) -> None:
    import transformers

    run_ranks(save, 2, str(tmp_path), timeout_s=120)
    output = tmp_path / "out"
    assert main(["consolidate", str(tmp_path / "checkpoint"), str(output), "--max-shard-size", limit]) == 0
    assert (output / "model.safetensors.index.json").exists() == (limit == "3kB")
    (output / "config.json").write_text((tmp_path / "expected" / "config.json").read_text())
    found, told = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "expected").state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert found.lm_head.weight is found.model.embed_tokens.weight
