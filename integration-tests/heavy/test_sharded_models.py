"""Models of transformers and peft, sharded and divided by the Accelerator, train and are saved as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from accel import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig, Process
from accel_state.process import ProcessSettings
from accel_state.testing import rank_environment, run_ranks

_STEPS = 6


def _llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def _lora() -> Any:
    model = _llama()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])).double()


def _model(kind: str) -> Any:
    return _lora() if kind == "lora" else _llama(tied=kind == "tied")


def _tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step))


def _arguments(name: str) -> dict[str, Any]:
    plugins = {
        "fsdp": FullyShardedDataParallelPlugin(),
        "recomputed": FullyShardedDataParallelPlugin(activation_checkpointing=True, reshard_after_forward=False),
    }
    meshes = {
        "tp": ParallelismConfig(tp_size=2),
        "cp": ParallelismConfig(cp_size=2),
        "sp": ParallelismConfig(sp_size=2),
        "tp x fsdp": ParallelismConfig(dp_shard_size=2, tp_size=2),
        "cp x fsdp": ParallelismConfig(dp_shard_size=2, cp_size=2),
        "cp x tp": ParallelismConfig(cp_size=2, tp_size=2),
    }
    return {"fsdp_plugin": plugins[name]} if name in plugins else {"parallelism_config": meshes[name]}


def _train(kind: str, name: str, folder: str) -> dict[str, Any]:
    arguments = _arguments(name)
    parallelism = arguments.get("parallelism_config")
    Process.open(
        ProcessSettings(mesh=parallelism.mesh_shape() if parallelism else None), environment=rank_environment()
    )
    accelerator = Accelerator(cpu=True, **arguments)
    model = _model(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    topology = accelerator.process.topology
    losses = []
    for step in range(_STEPS):
        rows = _tokens(step).chunk(topology.data_world_size)[topology.data_rank]
        batch = accelerator.shard_sequence({"input_ids": rows, "labels": rows})
        shifted = batch["shift_labels"]
        inputs = {key: value for key, value in batch.items() if key in ("input_ids", "position_ids")}
        optimizer.zero_grad()
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")
        accelerator.backward(loss, num_items=(shifted != -100).sum())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total = accelerator.strategy.sum_over_data(loss.detach())
        losses.append((total / (4 * 15)).item())
    # The lines that save a model for `from_pretrained`.
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        folder, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {"losses": losses}


def _alone(kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = _model(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for step in range(_STEPS):
        rows = _tokens(step)
        optimizer.zero_grad()
        logits = model(input_ids=rows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "name", "world_size"),
    [
        ("llama", "fsdp", 2),
        ("tied", "recomputed", 2),
        ("tied", "tp", 2),
        ("llama", "cp", 2),
        ("llama", "sp", 2),
        ("llama", "tp x fsdp", 4),
        ("llama", "cp x fsdp", 4),
        ("tied", "cp x tp", 4),
        ("lora", "fsdp", 2),
        ("lora", "recomputed", 2),
    ],
)
def test_a_real_model_trains_and_is_saved_as_in_one_process(
    kind: str, name: str, world_size: int, tmp_path: Path
) -> None:
    answers = run_ranks(_train, world_size, kind, name, str(tmp_path), open_process=False, timeout_s=100)
    losses, state = _alone(kind)
    for answer in answers:
        assert answer["losses"] == pytest.approx(losses, abs=1e-10)
    if kind == "lora":
        from peft import PeftModel

        loaded: Any = PeftModel.from_pretrained(_llama(), str(tmp_path)).double()
    else:
        loaded = LlamaForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float64)
    found = loaded.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10, msg=key)


def _loaded_for_a_mesh(folder: str) -> list[float]:
    """The lines of the release notes: sizes, the mesh, `from_pretrained`, `prepare`."""
    parallelism_config = ParallelismConfig(tp_size=2)
    Process.open(ProcessSettings(mesh=parallelism_config.mesh_shape()), environment=rank_environment())
    accelerator = Accelerator(cpu=True, parallelism_config=parallelism_config)
    model = AutoModelForCausalLM.from_pretrained(folder, device_mesh=accelerator.torch_device_mesh)
    model = accelerator.prepare(model)
    loss = model(input_ids=_tokens(0), labels=_tokens(0)).loss
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
    accelerator.end_training()
    return [loss.item(), norm.item()]


def test_a_model_that_was_loaded_for_the_mesh_is_prepared(tmp_path: Path) -> None:
    model = _llama().float()
    model.save_pretrained(tmp_path)
    loss = model(input_ids=_tokens(0), labels=_tokens(0)).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    for found in run_ranks(_loaded_for_a_mesh, 2, str(tmp_path), open_process=False):
        assert found == pytest.approx([loss.item(), norm.item()], abs=1e-5)
