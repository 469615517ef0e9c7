"""Which layers are quantized, and what is refused before any value is read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.quantize.options import BnbQuantizationConfig, TorchaoQuantizationConfig
from accel_bigmodel.quantize.selection import find_output_layers, quantized_layers, select_layers
from accel_state.errors import ConfigError

FOUR = BnbQuantizationConfig(load_in_4bit=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)


class Language(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


INNER = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")


def with_(**settings: list[str]) -> BnbQuantizationConfig:
    return BnbQuantizationConfig(load_in_4bit=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_all_but_the_head(tied: bool) -> None:
    for model in (Language(tied), _empty(tied)):
        assert select_layers(model, FOUR).layers == INNER


def _empty(tied: bool) -> Language:
    with init_empty_weights():
        return Language(tied)


def test_an_untied_head_is_quantized_where_asked_and_a_tied_one_never() -> None:
    assert select_layers(Language(), with_(skip_modules=[])).layers == (*INNER, "lm_head")
    assert select_layers(Language(tied=True), with_(skip_modules=[])).layers == INNER


def test_names_are_whole_or_parts() -> None:
    assert select_layers(Language(), with_(skip_modules=["up"])).layers == (INNER[1], INNER[3], "lm_head")
    assert select_layers(Language(), with_(skip_modules=["layers.0", "lm_head"])).layers == INNER[2:]
    with pytest.raises(ConfigError, match=r"`skip_modules` names 'layer', but.*no module of that name.*'lay"):
        select_layers(Language(), with_(skip_modules=["layer"]))


def test_what_stays_float32_is_not_quantized() -> None:
    selection = select_layers(Language(), with_(keep_in_fp32_modules=["norm", "layers.1.up"]))
    assert selection.layers == (INNER[0], INNER[1], INNER[3])
    norms = {f"layers.{number}.norm.{name}" for number in (0, 1) for name in ("weight", "bias")}
    assert selection.float32 == norms | {"layers.1.up.weight", "layers.1.up.bias"}
    with pytest.raises(ConfigError, match=r"`keep_in_fp32_modules` names 'nrom'.*Did you mean 'norm'"):
        select_layers(Language(), with_(keep_in_fp32_modules=["nrom"]))


def test_the_model_says_itself_what_stays_float32() -> None:
    model = Language()
    model._keep_in_fp32_modules = ["down", "absent"]  # type: ignore[assignment]
    assert select_layers(model, FOUR).layers == (INNER[0], INNER[2])
    assert select_layers(model, with_(keep_in_fp32_modules=[])).layers == INNER


def test_skipping_what_would_not_be_quantized_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`skip_modules` names 'embed', of the class `Embedding`.*Drop it"):
        select_layers(Language(), with_(skip_modules=["lm_head", "embed"]))


def test_linear_layers_that_others_read_are_left_alone() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert select_layers(model, FOUR).layers == ("linear1", "linear2")


def test_a_module_with_two_names_is_one_layer_and_tied_ones_are_none() -> None:
    shared, first, second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(shared, first, second, nn.Linear(8, 8), shared, nn.ReLU())
    assert select_layers(model, FOUR).layers == ("0", "3")


def test_output_layers() -> None:
    class Asked(Language):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[0]

    class Silent(Language):
        def get_output_embeddings(self) -> None:
            return None

    assert find_output_layers(Language()) == {"lm_head"}
    assert find_output_layers(Language(tied=True)) == {"lm_head"}
    assert find_output_layers(Asked()) == {"layers.0"}
    assert find_output_layers(Silent()) == {"lm_head"}
    assert find_output_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {"1"}
    assert find_output_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == frozenset()
    assert find_output_layers(nn.Sequential(nn.Sequential(nn.Linear(2, 2)))) == frozenset()
    assert find_output_layers(nn.Linear(2, 2)) == frozenset()


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Conv1d(2, 2, 1))], ids=["one", "h", "c"]
)
def test_a_model_without_layers_to_quantize(model: nn.Module) -> None:
    reason = r"Nothing of the .* can be quantized.*made of (Linear|Conv1d)|single `nn\.Linear`"
    with pytest.raises(ConfigError, match=reason):
        select_layers(model, TorchaoQuantizationConfig(weights="int8"))


def test_hooks_would_be_lost() -> None:
    model = Language()
    model.layers[1].up.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ConfigError, match=r"'layers\.1\.up' has hooks.*Remove them first"):
        select_layers(model, FOUR)
    assert select_layers(model, with_(skip_modules=["layers.1"])).layers == (*INNER[:2], "lm_head")


def test_a_quantized_model_is_told_by_the_class_of_its_weights() -> None:
    model = Language()
    assert quantized_layers(model) == []
    foreign = type("Params4bit", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    model.layers[1].up.weight = torch.Tensor._make_subclass(foreign, torch.zeros(2))  # type: ignore[assignment]
    assert quantized_layers(model) == ["layers.1.up"]
    with pytest.raises(ConfigError, match=r"quantized already: 'layers\.1\.up' and 0 more.*Make the model anew"):
        select_layers(model, FOUR)
