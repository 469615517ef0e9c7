"""Where tensors of a quantized model go, and which of them may be offloaded."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading.model_tensor import model_tensors
from accel_bigmodel.loading.place import Place
from accel_bigmodel.quantize.options import BnbQuantizationConfig, QuantizationConfig, TorchaoQuantizationConfig
from accel_bigmodel.quantize.placement import Placement, check_offload, infer_device_map, plan_placement
from accel_bigmodel.quantize.selection import select_layers
from accel_state.errors import ConfigError

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BNB = BnbQuantizationConfig(load_in_4bit=True)
LAYERS = ("a", "b")


def placed(a: Place, b: Place, main: torch.device = GPU) -> Placement:
    places: Mapping[str, Place] = {"a.weight": a, "b.weight": b, "norm.weight": GPU if main == GPU else CPU}
    return Placement(places, main)


@pytest.mark.parametrize("config", [BNB, TorchaoQuantizationConfig(weights="int4")])
def test_everything_on_devices_that_compute(config: QuantizationConfig) -> None:
    for placement in (placed(GPU, GPU), placed(GPU, torch.device("cuda", 1)), placed(CPU, CPU, main=CPU)):
        assert check_offload(LAYERS, config, placement) == LAYERS


@pytest.mark.parametrize("store", [CPU, "disk"])
def test_bitsandbytes_leaves_offloaded_layers_alone_or_refuses(store: Place) -> None:
    match = r"puts 'b\.weight' on 'cpu' or 'disk' beside 'cuda:0'.*`enable_offload=True`"
    with pytest.raises(ConfigError, match=match):
        check_offload(LAYERS, BNB, placed(GPU, store))
    allowed = BnbQuantizationConfig(load_in_4bit=True, enable_offload=True)
    assert check_offload(LAYERS, allowed, placed(GPU, store)) == ("a",)
    assert check_offload((), allowed, placed(store, store)) == ()


def test_torchao_streams_int8_from_the_host_and_nothing_else() -> None:
    eight, four = TorchaoQuantizationConfig(weights="int8"), TorchaoQuantizationConfig(weights="int4")
    assert check_offload(LAYERS, eight, placed(GPU, CPU)) == LAYERS
    assert check_offload(("a",), four, placed(GPU, CPU)) == ("a",)
    with pytest.raises(ConfigError, match=r"puts 'b' on 'cpu' beside 'cuda:0'.*layout of one device.*`skip_modules`"):
        check_offload(LAYERS, four, placed(GPU, CPU))
    with pytest.raises(ConfigError, match=r"puts 'b' on 'disk'.*it is in no file"):
        check_offload(LAYERS, eight, placed(GPU, "disk"))


@pytest.mark.parametrize("config", [BNB, TorchaoQuantizationConfig(weights="int8")])
def test_a_disk_without_an_accelerator(config: QuantizationConfig) -> None:
    with pytest.raises(ConfigError, match=r"'b\.weight' on the disk with nothing but the CPU.*Put it on 'cpu'"):
        check_offload(LAYERS, config, placed(CPU, "disk", main=CPU))


def test_maps() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tensors = model_tensors(model)
    for given in (None, "cpu", CPU, {"": "cpu"}, {"0": "cpu", "1": "cpu"}):
        placement = plan_placement(model, tensors, given)
        assert set(placement.places.values()) == {CPU}
        assert placement.main == CPU
        assert not placement.needs_dispatch
    mixed = plan_placement(model, tensors, {"0": "cpu", "1": "disk"})
    assert mixed.is_offloaded("1.weight")
    assert not mixed.is_offloaded("0.weight")
    assert mixed.device("1.weight") == CPU
    assert mixed.needs_dispatch
    with pytest.raises(ConfigError, match=r"`device_map` names '2'"):
        plan_placement(model, tensors, {"2": "cpu", "": "cpu"})
    with pytest.raises(ConfigError, match=r"`device_map` says nothing of 2.*`1\.weight`"):
        plan_placement(model, tensors, {"0": "cpu"})


def test_a_model_without_values_goes_to_what_computes_here() -> None:
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(2, 2))
    placement = plan_placement(model, model_tensors(model), None)
    assert {place.type for place in placement.places.values() if isinstance(place, torch.device)} == {
        placement.main.type
    }
    assert placement.main.type != "meta"


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (BnbQuantizationConfig(load_in_8bit=True), 8),
        (BNB, 5),
        (TorchaoQuantizationConfig(weights="int8"), 8),
        (TorchaoQuantizationConfig(weights="int4", group_size=32), 6),
        (TorchaoQuantizationConfig(weights="int4", group_size=32, torch_dtype="bf16"), 5),
        (TorchaoQuantizationConfig(weights="int4"), 5),
    ],
)
def test_an_automatic_map_counts_what_will_be_there(config: QuantizationConfig, bits: int) -> None:
    with init_empty_weights():
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256, bias=False)) for _ in range(8)), nn.Linear(256, 3))
    selection = select_layers(model, config)
    assert len(selection.layers) == 8
    head_bytes = (256 * 3 + 3) * (4 if config.torch_dtype is None else 2)
    size = 8 * 256 * 256 * bits // 8 + head_bytes
    for spare, fits in ((0, True), (-1, False)):
        made = infer_device_map(
            model,
            selection,
            config,
            strategy="sequential",
            max_memory={0: size + spare, "cpu": "1GiB"},
            no_split_module_classes=[],
        )
        assert (set(made.values()) == {0}) == fits
