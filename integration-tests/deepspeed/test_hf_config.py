"""transformers builds and loads a model divided, as `HfDeepSpeedConfig` tells it, and whole again afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel import Accelerator
from accel_parallel.deepspeed.config import DeepSpeedConfig
from accel_parallel.deepspeed.hf_config import HfDeepSpeedConfig
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_state import ProcessSettings
from accel_state.testing import run_ranks

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed lives in an environment of its own")
transformers = pytest.importorskip("transformers")

_LAYERS = 8


def _llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=_LAYERS, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Allocated(TorchDispatchMode):
    """The most bytes that were alive at once of those that operators allocated.

    Tensors that safetensors maps from a file are none of them: the system may drop their pages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in self._held((args, kwargs))}
        for leaf in self._held(out):
            storage = leaf.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    @staticmethod
    def _held(tree: Any) -> list[torch.Tensor]:
        """The tensors that have memory."""
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]


def _gathered(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def _load_divided(folder: str) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.init_distributed(dist_backend="gloo")
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}})
    told = HfDeepSpeedConfig(DeepSpeedConfig.of(plugin).before_model(precision="no"))
    with Allocated() as loading:
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    with Allocated() as building:
        built = transformers.LlamaForCausalLM._from_config(loaded.config)
    seen = {
        "peaks": (loading.peak, building.peak),
        "whole": sum(p.ds_numel * p.element_size() for p in loaded.parameters()),
        "divided": [hasattr(p, "ds_tensor") and p.numel() == 0 for m in (loaded, built) for p in m.parameters()],
        "held": sum(p.ds_tensor.numel() * p.element_size() for p in loaded.parameters()),
        "values": _gathered(loaded),
        "built": _gathered(built),
    }
    told.release()
    again = transformers.LlamaForCausalLM.from_pretrained(folder)
    seen["whole_again"] = all(not hasattr(p, "ds_tensor") and p.numel() > 0 for p in again.parameters())
    return seen


@pytest.mark.timeout(300)  # two ranks import DeepSpeed and transformers, and compile an operator the first time
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    reference = _llama()
    reference.save_pretrained(tmp_path)
    ranks = run_ranks(_load_divided, 2, str(tmp_path), timeout_s=280)
    whole = sum(p.numel() * p.element_size() for p in reference.parameters())
    a_layer = sum(p.numel() * p.element_size() for p in reference.model.layers[0].parameters())
    for seen in ranks:
        assert seen["whole"] == whole
        assert all(seen["divided"])
        assert seen["held"] == whole // 2
        for peak in seen["peaks"]:
            assert whole // 2 <= peak <= whole // 2 + a_layer, f"{peak} bytes at once of {whole}"
        assert seen["whole_again"]
        for name, value in reference.named_parameters():
            assert torch.equal(seen["values"][name], value), name
    for name, value in ranks[0]["built"].items():
        assert torch.equal(ranks[1]["built"][name], value), name
        assert "norm" in name or value.std() > 0, name


def test_the_latest_configuration_is_followed_until_it_is_released() -> None:
    bridge = transformers.integrations.deepspeed
    student = HfDeepSpeedConfig({"zero_optimization": {"stage": 2}})
    assert not bridge.is_deepspeed_zero3_enabled()
    teacher = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert bridge.is_deepspeed_zero3_enabled()
    student.release()
    assert bridge.is_deepspeed_zero3_enabled()
    teacher.release()
    assert bridge.deepspeed_config() is None


def choices() -> list[bool]:
    """Whether transformers divides models after each Accelerator."""
    found = []
    for stage, flag in ((3, None), (2, None), (3, None), (3, False)):
        accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=flag))
        accelerator.free_memory()
        found.append(transformers.integrations.deepspeed.is_deepspeed_zero3_enabled())
    return found


def test_the_latest_accelerator_decides_whether_models_are_divided() -> None:
    assert run_ranks(choices, 1, settings=ProcessSettings(device="cpu"), timeout_s=90) == [[True, False, True, False]]
