"""Tensors replaced one by one, with a backend that rounds: no library that quantizes is needed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading.model_tensor import model_tensors
from accel_bigmodel.quantize import load
from accel_bigmodel.quantize.filling import Filling
from accel_bigmodel.quantize.load import load_and_quantize_model
from accel_bigmodel.quantize.options import BnbQuantizationConfig, QuantizationConfig, TorchaoQuantizationConfig
from accel_bigmodel.quantize.placement import Placement
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError, ConfigError, MissingDependencyError


class Rounded(nn.Module):
    """A linear layer with int8 weights, one scale for all."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.bias = layer.bias
        self.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))

    def set(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.weight.float() * self.scale, self.bias)


class Rounding:
    """A `Backend` that counts what it is given."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[torch.UntypedStorage]] = []
        self.alive: list[int] = []
        self.marked: list[nn.Module] = []

    def check_layer(self, name: str, layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        if layer.in_features == 13:
            raise ConfigError(f"{name!r} has 13 inputs, an unlucky number. Give it others.")

    def stand_in(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        return Rounded(layer)

    def fill(self, module: Any, weight: torch.Tensor, device: torch.device) -> None:
        self.given.append(weakref.ref(weight.untyped_storage()))
        self.alive.append(sum(each() is not None for each in self.given))
        scale = weight.abs().max().float() / 127
        module.set((weight / scale).round().to(torch.int8).to(device), scale)

    def is_part(self, rest: str) -> bool:
        return rest == "scale"

    def restore(
        self, name: str, module: Any, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        module.set(weight.to(device, copy=True), parts["scale"].to(device, copy=True))

    def mark(self, model: nn.Module) -> None:
        self.marked.append(model)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6, bias=False), nn.LayerNorm(6)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(rows + self.down(self.up(rows).relu()))
        return result


class Language(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("angles", torch.linspace(0, 1, 3), persistent=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.embed(ids)
        for layer in self.layers:
            rows = layer(rows)
        result: torch.Tensor = self.lm_head(rows)
        return result


CONFIG = BnbQuantizationConfig(load_in_8bit=True)
IDS = torch.tensor([[1, 4, 10]])


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Rounding:
    made = Rounding()
    monkeypatch.setattr(load, "_backend", lambda config: made)
    return made


@pytest.fixture
def original() -> Language:
    torch.manual_seed(0)
    return Language()


@pytest.fixture
def folder(original: Language, tmp_path: Path) -> Path:
    state = original.state_dict()
    del state["lm_head.weight"]  # as files of tied models are
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


def empty(**settings: Any) -> Language:
    with init_empty_weights(**settings):
        return Language()


def quantize(model: nn.Module, folder: Path | None = None, config: QuantizationConfig = CONFIG) -> Any:
    return load_and_quantize_model(model, config, folder, device_map=None if folder is None else {"": "cpu"})


def test_from_a_file_and_in_place(backend: Rounding, original: Language, folder: Path) -> None:
    wanted = original(IDS).detach()
    streamed, in_place = quantize(empty(), folder), quantize(original)
    assert in_place is original
    assert backend.marked == [streamed, in_place]
    assert torch.equal(streamed(IDS), in_place(IDS))
    assert 0 < (streamed(IDS) - wanted).abs().max() < 0.1
    for model in (streamed, in_place):
        assert [name for name, each in model.named_modules() if isinstance(each, Rounded)] == [
            f"layers.{number}.{name}" for number in range(3) for name in ("up", "down")
        ]
        assert model.lm_head.weight is model.embed.weight
        assert model.layers[0].up.bias is not None
        assert not any(each.requires_grad for each in model.parameters())
        assert model.count.item() == 3


def test_no_more_than_one_tensor_is_held(backend: Rounding, original: Language, folder: Path) -> None:
    quantize(empty(), folder)
    assert backend.alive == [1] * 6
    model = quantize(original)
    assert len(backend.given) == 12
    assert max(backend.alive) == 1
    assert not any(each() is not None for each in backend.given)
    assert model is original


def test_the_result_lives_without_its_file(backend: Rounding, folder: Path) -> None:
    model = quantize(empty(), folder)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    file = folder / "model.safetensors"
    begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.seek(begin)
        stream.write(b"\0" * (file.stat().st_size - begin))
    for key, each in model.state_dict().items():
        assert torch.equal(each, before[key]), key


def test_dtypes(backend: Rounding, original: Language, folder: Path) -> None:
    config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype="bf16", keep_in_fp32_modules=["norm"])
    for model in (quantize(empty(), folder, config), quantize(original, None, config)):
        assert model.embed.weight.dtype == model.layers[1].up.bias.dtype == torch.bfloat16
        assert model.layers[1].norm.weight.dtype == torch.float32
        assert (model.count.dtype, model.angles.dtype) == (torch.int64, torch.float32)
        assert model.lm_head.weight is model.embed.weight


def test_what_was_quantized_before_is_taken_as_it_is(backend: Rounding, folder: Path, tmp_path: Path) -> None:
    model = quantize(empty(), folder)
    state = model.state_dict()
    del state["lm_head.weight"]
    (tmp_path / "again").mkdir()
    save_file(state, tmp_path / "again" / "model.safetensors")
    again = quantize(empty(), tmp_path / "again")
    assert torch.equal(again(IDS), model(IDS))
    assert len(backend.given) == 6


def test_a_module_with_two_names(backend: Rounding, tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        shared = nn.Linear(6, 6)
        return nn.Sequential(shared, nn.ReLU(), shared, nn.LayerNorm(6))

    torch.manual_seed(0)
    save_file({key: each.clone() for key, each in make().state_dict().items()}, tmp_path / "model.safetensors")
    with init_empty_weights():
        model = make()
    quantize(model, tmp_path)
    assert isinstance(model[0], Rounded)
    assert model[2] is model[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers.0.up.bias": None}, r"1 of the model's tensors are not in it: `layers\.0\.up\.bias`\. Give"),
        ({"extra": torch.ones(1)}, r"1 of its tensors are not in the model: `extra`\."),
        (
            {"embed.weight": None, "lm_head.weight": None, "embed.wieght": torch.ones(11, 6)},
            r"`embed\.weight` \(the other side has 'embed\.wieght'\)",
        ),
        ({"layers.2.down.weight": torch.ones(6, 9)}, r"`layers\.2\.down\.weight` is \[6, 10\] in.* and \[6, 9\]"),
        ({"lm_head.weight": torch.zeros(11, 6)}, r"`embed\.weight` and `lm_head\.weight` are one tensor.*different"),
        ({"layers.0.up.scale": torch.ones(())}, r"not in the model: `layers\.0\.up\.scale`"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    backend: Rounding, original: Language, tmp_path: Path, change: dict[str, torch.Tensor | None], match: str
) -> None:
    state = {key: each.clone() for key, each in original.state_dict().items()} | change
    save_file({key: each for key, each in state.items() if each is not None}, tmp_path / "model.safetensors")
    model = empty()
    with pytest.raises(CheckpointError, match=match):
        quantize(model, tmp_path)
    assert all(each.device.type == "meta" for each in model.parameters())
    assert backend.given == []


def test_a_model_without_values(backend: Rounding) -> None:
    with pytest.raises(ConfigError, match=r"'embed\.weight' and \d+ more tensors.*meta device.*`weights_location`"):
        quantize(empty())


def test_buffers_that_are_in_no_file(backend: Rounding, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`angles`.*init_empty_weights\(include_buffers=False\)"):
        quantize(empty(include_buffers=True), folder)


def test_a_layer_that_is_refused_changes_nothing(backend: Rounding, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 13), nn.Linear(13, 6), nn.ReLU())
    first = model[0]
    with pytest.raises(ConfigError, match="'1' has 13 inputs"):
        quantize(model)
    assert model[0] is first
    assert backend.given == []
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(6, 13), nn.Linear(13, 6), nn.ReLU())
    with pytest.raises(ConfigError, match="'1' has 13 inputs"):
        quantize(model, tmp_path)
    assert all(each.device.type == "meta" for each in model.parameters())


def test_what_may_be_missing_keeps_its_values_and_needs_no_gradient(backend: Rounding, folder: Path) -> None:
    class Larger(Language):
        _keys_to_ignore_on_load_missing = ("extra",)
        _keys_to_ignore_on_load_unexpected = ("count",)

    model = Larger()
    model.extra = nn.Parameter(torch.full((2,), 7.0))
    del model.count
    quantize(model, folder)
    assert model.extra.tolist() == [7.0, 7.0]
    assert not model.extra.requires_grad
    with init_empty_weights():
        model = Larger()
        model.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match="not in it: `extra`"):
        quantize(model, folder)


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_map_that_is_worked_out(backend: Rounding, folder: Path, strategy: str) -> None:
    model = load_and_quantize_model(empty(), CONFIG, folder, strategy, max_memory={"cpu": "1GiB"})
    assert len(backend.given) == 6
    assert all(each.device.type == "cpu" for each in model.parameters())


def test_what_is_on_disk_as_it_is_wanted_stays_there(backend: Rounding, folder: Path) -> None:
    gpu = torch.device("cuda", 0)
    for dtype, left in ((None, {"layers.1.norm.weight", "layers.1.norm.bias", "layers.1.up.bias"}), ("bf16", set())):
        config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype=dtype, enable_offload=True)
        model = empty()
        tensors = model_tensors(model)
        # Everything else would be on the accelerator; there is none here, so that stays on the CPU.
        places: dict[str, Any] = {
            each.name: "disk" if each.name.startswith("layers.1.") else torch.device("cpu") for each in tensors
        }
        layers = [f"layers.{number}.{name}" for number in (0, 2) for name in ("up", "down")]
        filling = Filling(model, backend, config, layers, frozenset(), Placement(places, gpu), tensors)
        filling.from_checkpoint(folder)
        weights = {"layers.1.up.weight", "layers.1.down.weight"} if left else set()
        assert set(filling.left_in_files) == left | weights
        empties = {name for name, each in model.named_parameters() if each.device.type == "meta"}
        assert empties == left | weights


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"offload_state_dict": True}, "`offload_state_dict=True`.*there is none.*Drop it"),
        ({"max_memory": {"cpu": "1GiB"}}, r"`max_memory` is for a device map that is worked out.*`device_map='auto'`"),
        ({"no_split_module_classes": [], "device_map": "cpu"}, "`no_split_module_classes` is for a device map"),
    ],
)
def test_arguments_that_would_do_nothing(backend: Rounding, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_and_quantize_model(Language(), CONFIG, **settings)


def test_what_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"is a `dict`.*`BnbQuantizationConfig` or a `TorchaoQuantizationConfig`"):
        load_and_quantize_model(Language(), {"load_in_8bit": True})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "package"), [(CONFIG, "bitsandbytes"), (TorchaoQuantizationConfig(weights="int8"), "torchao")]
)
def test_a_library_that_is_not_installed(
    config: QuantizationConfig, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"`{package}` is needed for .*pip install '{package}>=0"):
        load_and_quantize_model(Language(), config)
