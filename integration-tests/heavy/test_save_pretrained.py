"""The lines that hand a trained model of transformers on: what `from_pretrained` reads back is what was trained.

    unwrapped_model = accelerator.unwrap_model(model)
    unwrapped_model.save_pretrained(
        folder, save_function=accelerator.save, state_dict=accelerator.get_state_dict(model)
    )

and ``accelerator.save_model(model, folder, max_shard_size=...)``: in every way to spread a model, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from accel import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig, Process
from accel_state.process import ProcessSettings
from accel_state.testing import rank_environment, run_ranks

Saved = Callable[[str, str], Path]

SHARD = 3000
"""Bytes, of which each model has several times as many; an expert has more alone."""
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "half": ("LlamaConfig", {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
    "transposed": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "experts": ("MixtralConfig", {"num_local_experts": 4}),
}
"""Configurations by what is special about them: GPT-2 multiplies by transposed weights, and its lower layers are tied
to the output; Mixtral keeps all experts in one tensor, and writes them apart."""
MESHES = {
    "HSDP": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2),
    "TP": ParallelismConfig(tp_size=2),
    "TP x FSDP": ParallelismConfig(dp_shard_size=2, tp_size=2),
    "CP": ParallelismConfig(cp_size=2),
}
PLUGINS = {
    "FSDP": FullyShardedDataParallelPlugin(),
    "FSDP, whole": FullyShardedDataParallelPlugin(state_dict_type="FULL_STATE_DICT"),
}
WORLDS = {"one": 1, "DDP": 2, "FSDP": 2, "FSDP, whole": 2, "HSDP": 4, "TP": 2, "TP x FSDP": 4, "CP": 2}
DIVIDES = ("TP", "TP x FSDP", "CP")
"""Those which need a plan of the model, or attention that they know."""
CASES = [
    (world, kind)
    for world in WORLDS
    for kind in KINDS
    if world not in DIVIDES or kind in ("llama", "tied", "half")
]  # fmt: skip


def build(kind: str) -> Any:
    import transformers  # type: ignore[import-not-found, unused-ignore]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SMALL, **options}))


def step(accelerator: Accelerator, model: Any, optimizer: Any, number: int) -> None:
    topology = accelerator.process.topology
    rows = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(number))
    rows = rows.chunk(topology.data_world_size)[topology.data_rank]
    batch = accelerator.shard_sequence({"input_ids": rows, "labels": rows})
    shifted = batch.pop("shift_labels")
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "position_ids")}
    optimizer.zero_grad()
    logits = model(**inputs).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")
    accelerator.backward(loss, num_items=(shifted != -100).sum())
    optimizer.step()


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Gathered by torch alone. Every rank must call this."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()
        for name, tensor in model.named_parameters()
    }


def train_and_save(world: str, kinds: list[str], root: str) -> None:
    """Each kind of model is trained, saved in three ways, and trained on."""
    mesh = MESHES.get(world)
    Process.open(ProcessSettings(mesh=mesh.mesh_shape() if mesh else None), environment=rank_environment())
    for kind in kinds:
        accelerator = Accelerator(cpu=True, parallelism_config=mesh, fsdp_plugin=PLUGINS.get(world))
        model = build(kind).train()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        for number in range(2):
            step(accelerator, model, optimizer, number)
        folder = Path(root, kind)

        unwrapped_model = accelerator.unwrap_model(model)
        unwrapped_model.save_pretrained(
            folder / "seed", save_function=accelerator.save, state_dict=accelerator.get_state_dict(model)
        )
        unwrapped_model.save_pretrained(
            folder / "in shards",
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
            max_shard_size=SHARD,
        )
        accelerator.save_model(model, folder / "by accel")
        accelerator.save_model(model, folder / "by accel, in shards", max_shard_size=SHARD)
        trained = weights(unwrapped_model)
        if accelerator.is_main_process:
            for name in ("by accel", "by accel, in shards"):
                unwrapped_model.config.save_pretrained(folder / name)
            save_file(trained, folder / "trained")

        step(accelerator, model, optimizer, 2)
        later = weights(unwrapped_model)
        assert any(not torch.equal(later[name], tensor) for name, tensor in trained.items())
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    accelerator.end_training()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """``saved(world, kind)`` is the folder of what was saved; each world trains once."""
    folders: dict[str, Path] = {}

    def of(world: str, kind: str) -> Path:
        if world not in folders:
            folder = tmp_path_factory.mktemp("saved")
            kinds = [each for where, each in CASES if where == world]
            run_ranks(train_and_save, WORLDS[world], world, kinds, str(folder), open_process=False, timeout_s=110)
            folders[world] = folder
        return folders[world] / kind

    return of


def held(folder: Path) -> dict[str, list[str]]:
    """Names of tensors, by file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = sorted(file.keys())
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("world", "kind"), CASES)
@pytest.mark.parametrize("how", ["seed", "in shards", "by accel", "by accel, in shards"])
def test_what_is_read_back_is_what_was_trained(saved: Saved, world: str, kind: str, how: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved(world, kind) / how
    trained = load_file(folder.with_name("trained"))
    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert [str(problem) for problems in said.values() for problem in problems] == []
    same({name: tensor.detach() for name, tensor in model.named_parameters()}, trained)
    first = next(build(kind).parameters())
    assert not torch.equal(first, next(iter(model.parameters()))), "it was never trained"


@pytest.mark.parametrize(("world", "kind"), CASES)
def test_files_hold_what_a_plain_model_would_write(saved: Saved, world: str, kind: str, tmp_path: Path) -> None:
    """Each tensor once, tied ones under the name that `transformers` keeps, and nothing else in the folder."""
    folder, plain = saved(world, kind), build(kind)
    plain.save_pretrained(tmp_path / "seed")
    plain.save_pretrained(tmp_path / "in shards", max_shard_size=SHARD)
    for how in ("seed", "in shards"):
        assert held(folder / how) == held(tmp_path / how)
        assert {path.name for path in (folder / how).iterdir()} == {path.name for path in (tmp_path / how).iterdir()}


@pytest.mark.parametrize(("world", "kind"), CASES)
def test_shards_of_save_model(saved: Saved, world: str, kind: str) -> None:
    whole, folder = saved(world, kind) / "by accel", saved(world, kind) / "by accel, in shards"
    trained = load_file(folder.with_name("trained"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(shards) >= 3
    assert sorted(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert sum(map(len, shards.values())) == len(index["weight_map"])  # none twice
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert all(size <= SHARD or len(one) == 1 for size, one in zip(sizes, shards.values(), strict=True))
    assert index["metadata"]["total_size"] == sum(sizes) == sum(tensor.nbytes for tensor in trained.values())
    same({name: tensor for tensors in shards.values() for name, tensor in tensors.items()}, trained)
    same(load_file(whole / "model.safetensors"), trained)
    expected = {"config.json", "model.safetensors.index.json", *shards}
    assert {path.name for path in folder.iterdir()} == expected
