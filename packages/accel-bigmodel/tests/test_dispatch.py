"""Models spread by a map, whole models that take turns, and single tensors: on stand-ins for accelerators."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel.dispatch import DeviceTable, dispatch, dispatch_model
from accel_bigmodel.init import init_empty_weights
from accel_bigmodel.offload import alignment
from accel_bigmodel.offload.access import align_module_device, set_module_tensor_to_device
from accel_bigmodel.offload.division import group_tensors
from accel_bigmodel.offload.handover import UserCpuOffloadHook, cpu_offload_with_hook, hand_over
from accel_bigmodel.offload.hooks import units_of
from accel_bigmodel.offload.offloading import cpu_offload, disk_offload, has_offloaded_params, remove_hooks, to_disk
from accel_bigmodel.offload.placeholder import Placeholder
from accel_bigmodel.offload.streaming import stream_tensors
from accel_bigmodel.stored import read_index
from accel_bigmodel.testing import FakeTransfers, save_file
from accel_state.errors import CheckpointError, ConfigError


class Model(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(6, 7)

    def forward(self, tokens: torch.Tensor, *, scale: torch.Tensor | float = 1.0) -> dict[str, torch.Tensor]:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"logits": self.head(hidden) * scale}


TOKENS = torch.arange(5)


def make() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def expected() -> torch.Tensor:
    with torch.no_grad():
        return make()(TOKENS)["logits"]  # type: ignore[no-any-return]


class Stands(DeviceTable):
    """Numbers are stand-ins on the CPU; the host is the host."""

    def __init__(self) -> None:
        self.fake = {number: FakeTransfers() for number in range(2)}

    def device(self, place: Any) -> torch.device:
        return torch.device("cpu")

    def transfers(self, place: Any) -> FakeTransfers | None:
        return self.fake.get(place)


@pytest.fixture
def devices() -> Stands:
    return Stands()


@pytest.fixture
def models() -> Iterator[list[nn.Module]]:
    made: list[nn.Module] = []
    yield made
    for model in made:
        for unit in units_of(model):
            unit.engine.close()


MAP = {"embed": 0, "layers.0": 0, "layers.1": 1, "layers.2": "cpu", "layers.3": "disk", "head": "cpu"}


def test_every_part_computes_where_the_map_says(
    tmp_path: Path, devices: Stands, models: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.device] = []
    send = alignment.send_to_device

    def recorded(tree: Any, device: torch.device, **_: Any) -> Any:
        moved.append(device)
        return send(tree, device)

    monkeypatch.setattr(alignment, "send_to_device", recorded)
    model = dispatch(make(), MAP, devices, offload_dir=tmp_path)
    models.append(model)
    assert model.hf_device_map == MAP
    streamed = {unit.name for unit in units_of(model)}
    assert streamed == {"layers.2", "layers.3", "head"}
    assert not has_offloaded_params(model.embed)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with devices.fake[0].watch(), torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(TOKENS)["logits"], expected())
    # Two for each module of the map and for the whole, which also has its outputs brought back.
    assert len(moved) == 3 * (2 * 7 + 1)
    assert devices.fake[0].num_copies > 0
    assert devices.fake[1].num_copies == 0
    assert model.layers[2][1].running_mean.device.type == "cpu"
    assert {unit.name: len(unit.tensors) for unit in units_of(model)}["layers.2"] == 4  # no buffers


def test_buffers_go_too_if_asked(tmp_path: Path, devices: Stands, models: list[nn.Module]) -> None:
    model = dispatch(make(), MAP, devices, offload_dir=tmp_path, offload_buffers=True)
    models.append(model)
    assert {unit.name: len(unit.tensors) for unit in units_of(model)}["layers.3"] == 7
    with devices.fake[0].watch(), torch.no_grad():
        assert torch.equal(model(TOKENS)["logits"], expected())
        model.train()
        model(TOKENS)
    reference = make().train()
    reference(TOKENS)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_files_are_read_in_place(tmp_path: Path, devices: Stands, models: list[nn.Module]) -> None:
    save_file(make().state_dict(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with init_empty_weights():
        model = Model().eval()
    statistics = {name: value for name, value in make().state_dict().items() if "running" in name}
    model.load_state_dict(statistics, strict=False)
    index = read_index(tmp_path)
    dispatch(model, {"": "disk"}, devices, main_device=0, values=index)
    models.append(model)
    with devices.fake[0].watch(), torch.no_grad():
        assert torch.equal(model(TOKENS)["logits"], expected())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    # Where the CPU computes, the file itself is the memory.
    with init_empty_weights(include_buffers=True):
        mapped = Model().eval()
    dispatch_model(mapped, {"": "disk"}, offload_index=index)
    assert units_of(mapped) == []
    with torch.no_grad():
        assert torch.equal(mapped(TOKENS)["logits"], expected())
        mapped.head.bias.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    copied = copy.deepcopy(mapped)
    assert torch.equal(copied.head.weight, make().head.weight)


def test_written_weights_last_as_long_as_the_model(tmp_path: Path, models: list[nn.Module]) -> None:
    transfers = FakeTransfers()
    model = make()
    tensors = [each for each in group_tensors(model) if each.places[0].is_parameter]
    values: dict[str, Any] = {}
    file = to_disk(tensors, values, tmp_path)
    stream_tensors(model, tensors, values, transfers=transfers, keep=file)
    del file, values
    (path,) = tmp_path.iterdir()
    left = tmp_path / "offloaded-0123.safetensors"
    left.write_bytes(b"of a process that was killed")
    twin = copy.deepcopy(model)
    other = disk_offload(make(), tmp_path, "cpu")
    assert path.exists(), "another process's file is let alone"
    assert not left.exists()
    with torch.no_grad():
        for each in (model, twin, other):
            assert torch.equal(each(TOKENS)["logits"], expected())
    for each in (model, twin):
        for unit in units_of(each):
            unit.engine.close()
    del model, each, unit
    assert path.exists()
    del twin
    assert not path.exists()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    model = make()
    with pytest.raises(CheckpointError, match="no room"):
        disk_offload(model, tmp_path / "folder", "cpu")
    assert list((tmp_path / "folder").iterdir()) == []
    with torch.no_grad():
        assert torch.equal(model(TOKENS)["logits"], expected())


def test_what_is_trained_stays_on_the_device(devices: Stands) -> None:
    model = make().requires_grad_(False)
    model.layers[2][0].bias.requires_grad_(True)
    dispatch(model, {"": "cpu"}, devices, main_device=0)
    assert [name for name, each in model.named_parameters() if not isinstance(each, Placeholder)] == ["layers.2.0.bias"]
    with devices.fake[0].watch():
        model(TOKENS)["logits"].sum().backward()
    reference = make()
    reference(TOKENS)["logits"].sum().backward()
    assert torch.equal(model.layers[2][0].bias.grad, reference.layers[2][0].bias.grad)


def test_one_device_and_no_hooks(devices: Stands) -> None:
    model = dispatch(make(), {"": 0}, devices)
    assert all(not module._forward_pre_hooks for module in model.modules())
    forced = dispatch(make(), {"": 0}, devices, force_hooks=True)
    assert forced._forward_pre_hooks
    assert torch.equal(forced(TOKENS)["logits"], make()(TOKENS)["logits"])
    remove_hooks(forced)
    assert not forced._forward_pre_hooks


def test_where_the_cpu_computes_nothing_is_hooked(tmp_path: Path) -> None:
    model = cpu_offload(make(), "cpu")
    mapped = disk_offload(make(), tmp_path, "cpu")
    spread = dispatch_model(make(), {"embed": "cpu", "layers": "disk", "head": "cpu"}, offload_dir=tmp_path)
    for each in (model, mapped, spread):
        assert all(not module._forward_pre_hooks for module in each.modules())
        with torch.no_grad():
            assert torch.equal(each(TOKENS)["logits"], expected())
        each(TOKENS)["logits"].sum().backward()


@pytest.mark.parametrize(
    ("device_map", "arguments", "message"),
    [
        ({"embed": 0, "layers": 0}, {}, "head"),
        ({"": 0, "layer.1": "cpu"}, {}, r"layer\.1.*[Dd]id you mean"),
        ({"": "disk"}, {"main_device": 0}, "no\\s+`offload_dir`|offload_dir"),
        ({"": 0}, {"main_device": "disk"}, "computes nothing"),
    ],
)
def test_maps_that_cannot_work(devices: Stands, device_map: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch(make(), device_map, devices, **arguments)


def test_weights_without_values_are_named(devices: Stands) -> None:
    with init_empty_weights():
        model = Model()
    with pytest.raises(ConfigError, match=r"`embed\.weight` was to be offloaded, but is on the meta device"):
        dispatch(model, {"": "cpu"}, devices, main_device=0)
    with pytest.raises(ConfigError, match=r"shape \[7, 6\], but the value given for it has \[1, 6\]"):
        dispatch(model, {"": "cpu"}, devices, main_device=0, values={"embed.weight": torch.zeros(1, 6)})
    state = make().state_dict()
    dispatch(model.eval(), {"": "cpu"}, devices, main_device=0, values=state)
    with torch.no_grad():
        assert torch.equal(model(TOKENS)["logits"], expected())


# Whole models


def test_models_take_turns() -> None:
    transfers = FakeTransfers()
    device = torch.device("cpu")
    first, second = make(), make()
    hook = hand_over(first, device, transfers, None)
    after = hand_over(second, device, transfers, hook)
    with transfers.watch(), torch.no_grad():
        for _ in range(3):
            for _ in range(2):
                assert torch.equal(first(TOKENS)["logits"], expected())
            assert torch.equal(second(TOKENS)["logits"], expected())
            assert isinstance(first.embed.weight, Placeholder)
            size = transfers.held_bytes
            after.offload()
    assert transfers.peak_bytes == size, "never both"
    assert transfers.num_copies == 2 * 3
    after.offload()
    hook.offload()
    assert transfers.held_bytes == 0
    twin = copy.deepcopy(second)
    with transfers.watch(), torch.no_grad():
        assert torch.equal(twin(TOKENS)["logits"], expected())
    hook.remove()
    assert not first._forward_pre_hooks
    first(TOKENS)["logits"].sum().backward()


def test_models_take_turns_on_the_cpu_too() -> None:
    model, hook = cpu_offload_with_hook(make(), "cpu")
    other, after = cpu_offload_with_hook(make(), "cpu", hook)
    assert isinstance(after, UserCpuOffloadHook)
    with torch.no_grad():
        assert torch.equal(other(TOKENS)["logits"], model(TOKENS)["logits"])
    after.remove()
    assert not other._forward_pre_hooks


# Single tensors


def test_weights_of_a_module_can_be_looked_at_and_changed() -> None:
    model = make()
    transfers = FakeTransfers()
    tensors = [each for each in group_tensors(model) if each.places[0].is_parameter]
    stream_tensors(model, tensors, {}, transfers=transfers)
    with align_module_device(model.layers[1]), torch.no_grad(), transfers.watch():
        assert torch.equal(model.layers[1][0].weight * 1, make().layers[1][0].weight)
        model.layers[1][0].weight.zero_()
    assert isinstance(model.layers[1][0].weight, Placeholder)
    assert model.state_dict()["layers.1.0.weight"].abs().sum() == 0
    brought = align_module_device(model.layers[1], "cuda:3")
    with pytest.raises(ConfigError, match=r"`cuda:3`"), brought:
        pass
    plain = make()
    with align_module_device(plain, "cpu"):
        assert plain.head.weight.device.type == "cpu"


def test_single_tensors_can_be_set() -> None:
    model = make()
    set_module_tensor_to_device(model, "head.bias", "meta")
    assert model.head.bias.device.type == "meta"
    with pytest.raises(ConfigError, match=r"`head\.bias` is on the meta device and has no value"):
        set_module_tensor_to_device(model, "head.bias", "cpu")
    with pytest.raises(ConfigError, match=r"shape \[7\], and its new value has \[3\]"):
        set_module_tensor_to_device(model, "head.bias", "cpu", torch.zeros(3))
    with pytest.raises(ConfigError, match=r"'head\.bais'. Did you mean 'head\.bias'"):
        set_module_tensor_to_device(model, "head.bais", "cpu")
    set_module_tensor_to_device(model, "head.bias", "cpu", torch.ones(7), dtype="bfloat16")
    assert model.head.bias.dtype == torch.bfloat16
    assert isinstance(model.head.bias, nn.Parameter)
    tensors = [each for each in group_tensors(model) if each.places[0].is_parameter]
    stream_tensors(model, tensors, {}, transfers=FakeTransfers())
    set_module_tensor_to_device(model, "head.bias", "cpu", torch.full((7,), 3.0))
    assert model.state_dict()["head.bias"].tolist() == [3.0] * 7
    with pytest.raises(ConfigError, match="is offloaded"):
        set_module_tensor_to_device(model, "head.bias", "cpu")


def test_modules_that_read_their_childrens_weights_take_them_along() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows @ self.inner.weight

    model = nn.Sequential(Reads(), nn.Linear(3, 2))
    tensors = group_tensors(model)
    rows = torch.ones(1, 3)
    with torch.no_grad():
        right = model(rows)
        transfers = FakeTransfers()
        with pytest.raises(ConfigError, match=r"'Raeds'.*no module"):
            stream_tensors(model, tensors, {}, transfers=transfers, preload_module_classes=["Raeds"])
        stream_tensors(model, tensors, {}, transfers=transfers, preload_module_classes=["Reads"])
        assert torch.equal(model(rows), right)
