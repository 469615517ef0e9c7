"""Device maps of models: what stays whole, what is tied, what is counted, and budgets as users write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel.init import init_empty_weights
from accel_bigmodel.placing import (
    Workload,
    census,
    census_of_headers,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
    plan_model,
)
from accel_bigmodel.placing.memory import parse_size, place_key
from accel_bigmodel.stored import read_index
from accel_state.errors import ConfigError
from accel_state.tensor_format import TensorShape, file_header


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.up(self.norm(x)))
        return result


class Language(nn.Module):
    def __init__(self, num_blocks: int = 4, *, tied: bool = False) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(16, 8))
        self.embed = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.act = nn.GELU()
        self.head = nn.Linear(8, 100, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


BLOCK = 4 * (16 + 8 * 32 + 32 + 8 * 32 + 8)
EMBED = 4 * 800


def language(num_blocks: int = 4, *, tied: bool = False) -> Language:
    with init_empty_weights():
        return Language(num_blocks, tied=tied)


def test_a_chain_has_blocks_whole_and_tensors_of_the_model_itself() -> None:
    chain = census(language())
    assert [layer.name for layer in chain.layers] == [
        "position", "embed", *(f"blocks.{number}" for number in range(4)), "act", "head",
    ]  # fmt: skip
    assert [layer.total_bytes for layer in chain.layers] == [512, EMBED, *[BLOCK] * 4, 0, EMBED]
    assert [layer.kind for layer in chain.layers[:3]] == ["Parameter", "Embedding", "Block"]
    assert chain.hidden == 8
    assert [layer.wide for layer in chain.layers[2:3]] == [32]
    assert chain.layers[1].is_lookup
    assert chain.layers[1].matrix_elements == 0
    assert chain.layers[2].matrix_elements == 2 * 8 * 32


def test_a_real_model_and_one_without_values_have_one_chain() -> None:
    for tied in (False, True):
        assert census(Language(tied=tied)) == census(language(tied=tied))


def test_classes_given_take_the_place_of_those_found() -> None:
    names = [layer.name for layer in census(language(2), no_split_module_classes=[]).layers]
    assert "blocks.0.up" in names
    names = [layer.name for layer in census(language(2), no_split_module_classes="LayerNorm").layers]
    assert names.count("blocks.0.norm") == 1
    names = [layer.name for layer in census(language(2), no_split_module_classes="ModuleList").layers]
    assert "blocks.0.up" in names, "nobody calls a list, so it is no unit"
    with pytest.raises(ConfigError, match=r"names 'Blok'.*Did you mean 'Block'\?"):
        census(language(2), no_split_module_classes=["Blok"])


def test_classes_that_a_model_lists_and_this_variant_does_not_have_are_no_error() -> None:
    model = language(2)
    model._no_split_modules = ["Block", "VisionBlock"]  # type: ignore[assignment]
    assert infer_auto_device_map(model, {0: "1GB"}, model._no_split_modules) == {"": 0}  # type: ignore[arg-type]


def test_dtypes_of_the_plan() -> None:
    assert census(language(), dtype="bf16").total_bytes == census(language()).total_bytes // 2
    special = census(language(), dtype="bf16", special_dtypes={"embed.weight": "float32"})
    assert special.total_bytes == census(language()).total_bytes // 2 + EMBED // 2
    with pytest.raises(ConfigError, match=r"`special_dtypes` names 'embed.wight'.*Did you mean 'embed.weight'"):
        census(language(), special_dtypes={"embed.wight": "float32"})


def test_one_device_gets_all_and_the_map_has_one_entry() -> None:
    assert infer_auto_device_map(language(), {0: "1GB", "cpu": "1GB"}) == {"": 0}


def test_a_clean_map_names_the_largest_modules_and_a_full_one_every_layer() -> None:
    memory: dict[int | str, int | str] = {0: 512 + EMBED + BLOCK, 1: 3 * BLOCK + EMBED}
    assert infer_auto_device_map(language(), memory, strategy="sequential") == {
        "position": 0, "embed": 0, "blocks.0": 0, "blocks.1": 1, "blocks.2": 1, "blocks.3": 1, "act": 1, "head": 1,
    }  # fmt: skip
    memory = {0: 512 + EMBED, 1: 4 * BLOCK + EMBED}
    clean = infer_auto_device_map(language(), memory, strategy="sequential")
    assert clean == {"position": 0, "embed": 0, "blocks": 1, "act": 1, "head": 1}
    full = infer_auto_device_map(language(), memory, strategy="sequential", clean_result=False)
    assert len(full) == 8


def test_tied_parameters_are_together_and_once() -> None:
    model = language(tied=True)
    assert census(model).total_bytes == 512 + EMBED + 4 * BLOCK
    memory: dict[int | str, int | str] = {0: 512 + EMBED + BLOCK, 1: 3 * BLOCK}
    found = infer_auto_device_map(model, memory, strategy="sequential")
    assert found["head"] == found["embed"] == 0
    assert found["blocks.3"] == 1


def test_parameters_that_will_be_tied_are_treated_as_tied() -> None:
    memory: dict[int | str, int | str] = {0: 512 + EMBED + BLOCK, 1: 3 * BLOCK, "cpu": 0, "disk": 0}
    with pytest.raises(ConfigError, match="more"):
        infer_auto_device_map(language(), memory)
    found = infer_auto_device_map(language(), memory, tied_parameters=[["embed.weight", "head.weight"]])
    assert found["head"] == found["embed"]
    with pytest.raises(ConfigError, match=r"`tied_parameters` names 'head.wait'"):
        infer_auto_device_map(language(), memory, tied_parameters=[["embed.weight", "head.wait"]])


def test_one_module_at_two_places_is_tied_to_itself() -> None:
    model = language(2)
    model.again = model.embed
    found = infer_auto_device_map(model, {0: 512 + EMBED + BLOCK, 1: BLOCK + EMBED}, strategy="sequential")
    assert found["again"] == found["embed"] == 0


def test_what_fits_nowhere_goes_to_the_disk() -> None:
    found = infer_auto_device_map(language(), {"cpu": 512 + EMBED + BLOCK}, strategy="sequential")
    assert found["blocks.0"] == "cpu"
    assert found["blocks.1"] == found["head"] == "disk"


def test_the_kv_cache_of_the_configuration_is_counted_with_the_blocks() -> None:
    model: Any = language()
    model.config = SimpleNamespace(
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, hidden_size=8, head_dim=4, use_cache=True
    )
    work = Workload(batch_size=2, sequence_length=16, activation_bytes=0)
    plan = plan_model(model, {0: "1GB"}, workload=work)
    each = 2 * 2 * 16 * 4 * 4  # keys and values, batch, tokens, features, bytes
    assert plan.problem.kv_bytes == [0, 0, *[each] * 4, 0, 0]
    assert plan.prediction.uses[0].kv_bytes == 4 * each
    model.config.num_hidden_layers = 2
    assert sum(plan_model(model, {0: "1GB"}, workload=work).problem.kv_bytes) == 2 * each
    assert plan_model(model, {0: "1GB"}, workload=Workload(kv_cache=False)).prediction.uses[0].kv_bytes == 0


def test_the_share_of_experts_that_a_token_visits() -> None:
    model: Any = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(2):
        block: Any = nn.Sequential(nn.Linear(8, 4, bias=False))
        block.experts = nn.Linear(8, 32, bias=False)
        model.layers.append(block)
    assert census(model).layers[0].matrix_elements == 32 + 256
    model.config = SimpleNamespace(num_experts_per_tok=2, num_local_experts=8)
    assert census(model).layers[0].matrix_elements == 32 + 64


def test_balanced_memory_makes_filling_in_order_even() -> None:
    model = language(8)
    memory: dict[int | str, int | str] = {0: "1MB", 1: "1MB", "cpu": "1MB"}
    cut = get_balanced_memory(model, memory)
    assert cut[1] == cut["cpu"] == 10**6
    in_order = infer_auto_device_map(model, cut, strategy="sequential")
    assert in_order == infer_auto_device_map(model, memory, strategy="balanced")
    assert set(in_order.values()) == {0, 1}
    assert get_balanced_memory(model, memory, low_zero=True)[0] == 0


def test_verbose_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    infer_auto_device_map(language(), {0: "1GB"}, verbose=True)
    assert "blocks.0" not in capsys.readouterr().out.partition("\n")[0]
    infer_auto_device_map(language(), {0: "1GB"}, verbose=True)
    assert "position..head (8)" in capsys.readouterr().out


def test_sequential_may_place_around_what_is_too_large() -> None:
    memory: dict[int | str, int | str] = {"cpu": EMBED - 4}
    around = infer_auto_device_map(language(2), memory, strategy="sequential", fallback_allocation=True)
    assert around["embed"] == "disk"
    assert around["blocks.0"] == "cpu"
    behind = infer_auto_device_map(language(2), memory, strategy="sequential")
    assert behind["blocks"] == "disk"


def test_a_model_without_anything() -> None:
    with pytest.raises(ConfigError, match="neither parts nor parameters"):
        infer_auto_device_map(nn.ModuleList(), {0: "1GB"})


def test_chains_from_headers_alone(tmp_path: Any) -> None:
    shapes = {
        "model.embed_tokens.weight": (100, 8), "model.norm.weight": (8,), "lm_head.weight": (100, 8),
        **{f"model.layers.{number}.up.weight": (32, 8) for number in range(12)},
        **{f"model.layers.{number}.down.weight": (8, 32) for number in range(12)},
    }  # fmt: skip
    tensors = {name: TensorShape(shape, torch.bfloat16) for name, shape in shapes.items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_header(tensors) + bytes(sum(each.nbytes for each in tensors.values())))
    chain = census_of_headers(read_index(path))
    assert [layer.name for layer in chain.layers] == [
        "model.embed_tokens", *(f"model.layers.{number}" for number in range(12)), "lm_head", "model.norm",
    ]  # fmt: skip
    assert chain.layers[1].is_block
    assert chain.layers[1].total_bytes == 2 * 2 * 256
    assert chain.layers[0].is_lookup
    assert chain.dtype == torch.bfloat16
    assert census_of_headers(read_index(path), dtype="float32").total_bytes == 2 * chain.total_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5", 5), ("20GiB", 20 << 30), ("1.5 gib", 3 << 29), ("8GB", 8 * 10**9), ("3mb", 3 * 10**6), (0, 0)],
)
def test_sizes_as_users_write_them(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", [-1, True, "8Gb", "8 Q", "GB", "", None, 1.5])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no size in bytes.*'20GiB'"):
        get_max_memory({0: size})


def test_places_in_order_whatever_order_they_are_given_in() -> None:
    found = get_max_memory({"disk": "1TB", "cpu": "1GB", 1: 5, "cuda:0": 3})
    assert list(found) == [0, 1, "cpu", "disk"]
    with pytest.raises(ConfigError, match="names device 0 twice"):
        get_max_memory({0: 1, "cuda:0": 2})
    with pytest.raises(ConfigError, match=r"names 'dsk'.*Did you mean 'disk'\?"):
        get_max_memory({"dsk": 1})
    with pytest.raises(ConfigError, match="is no mapping"):
        get_max_memory("20GiB")  # type: ignore[arg-type]
    assert place_key(torch.device("cuda", 1), setting="x") == 1
    assert place_key("mps", setting="x") == "mps"


def test_the_memory_of_this_machine() -> None:
    found = get_max_memory()
    assert list(found)[-1] == "cpu"
    assert all(size > 0 for size in found.values())
    assert infer_auto_device_map(language(), strategy="sequential")  # with what is free here


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size=0` is no count"),
        ({"phase": "both"}, "`phase='both'`"),
        ({"dtype": "int8"}, "no floating-point dtype"),
        ({"activation_bytes": -1}, "no number of bytes"),
    ],
)
def test_workloads_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload(**settings)
