"""Loading and dispatching in one call: maps that are worked out, and settings that would do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading import load_checkpoint_and_dispatch
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError, ConfigError

BLOCK_BYTES = (40 * 40 + 40) * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 40)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(values))


def make() -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(6)))


def empty() -> Any:
    with init_empty_weights():
        return make()


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, nn.Sequential]:
    torch.manual_seed(0)
    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path, model


VALUES = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "device_map", [None, "auto", "balanced", "sequential", "cpu", {"": "disk"}, {"": "cpu", "2": "disk"}]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="outputs of an accelerator differ in their last bits")
def test_the_model_gives_the_outputs_of_the_one_that_was_saved(
    checkpoint: tuple[Path, nn.Sequential], device_map: Any
) -> None:
    folder, original = checkpoint
    model = empty()
    returned = load_checkpoint_and_dispatch(model, folder, device_map)
    assert returned is model
    with torch.no_grad():
        assert torch.equal(model(VALUES), original(VALUES))
    assert sorted(each.name for each in folder.iterdir()) == ["model.safetensors"], "something was written"


def test_a_map_is_worked_out_for_the_dtype_that_is_loaded(checkpoint: tuple[Path, nn.Sequential]) -> None:
    folder, original = checkpoint
    save_file({name: each.bfloat16() for name, each in original.state_dict().items()}, folder / "model.safetensors")
    budget = {"cpu": 4 * BLOCK_BYTES}  # enough for all in bfloat16, not in float32
    model = load_checkpoint_and_dispatch(empty(), folder, "auto", budget, dtype="auto")
    assert set(model.hf_device_map.values()) == {"cpu"}
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    model = load_checkpoint_and_dispatch(empty(), folder, "auto", budget, offload_folder=folder / "offload")
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert model(VALUES).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, r"`max_memory=.* but no device map is worked out.*`device_map='auto'`"),
        ({"no_split_module_classes": ["Block"], "device_map": {"": "cpu"}}, "`no_split_module_classes=.* no device"),
        ({"skip_keys": "cache"}, "`skip_keys='cache'` was given, but without a device map nothing is dispatched"),
        ({"force_hooks": True}, "`force_hooks=True` was given, but without a device map"),
        ({"offload_state_dict": True}, "`offload_state_dict=True` moves tensors to disk"),
        ({"full_state_dict": False}, "`full_state_dict=False` means a checkpoint"),
    ],
)
def test_settings_without_an_effect_are_refused(
    checkpoint: tuple[Path, nn.Sequential], arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_checkpoint_and_dispatch(empty(), checkpoint[0], **arguments)


def test_a_budget_too_small_for_anything_is_refused_before_anything_is_read(
    checkpoint: tuple[Path, nn.Sequential],
) -> None:
    model = empty()
    with pytest.raises(ConfigError, match=r"`max_memory` offers cpu: 100 B, disk: 100 B"):
        load_checkpoint_and_dispatch(model, checkpoint[0], "auto", {"cpu": 100, "disk": 100})
    assert all(each.is_meta for each in model.parameters())


def test_errors_of_loading_come_through(checkpoint: tuple[Path, nn.Sequential]) -> None:
    with pytest.raises(CheckpointError, match="does not fit the Sequential"):
        load_checkpoint_and_dispatch(nn.Sequential(nn.Linear(1, 1)), checkpoint[0], {"": "cpu"})
