"""Device maps proved: every error names what is wrong and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel.init import init_empty_weights
from accel_bigmodel.placing import Workload, check_device_map, infer_auto_device_map
from accel_state.errors import ConfigError


class Model(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(3))
        self.act = nn.GELU()
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def model(*, tied: bool = False) -> Model:
    with init_empty_weights():
        return Model(tied=tied)


WHOLE: dict[str, int | str | torch.device] = {"embed": 0, "blocks": 1, "head": "cpu"}


@pytest.mark.parametrize(
    "device_map",
    [
        {"": 0},
        {"": "cpu"},
        {"": torch.device("cuda", 1)},
        WHOLE,
        {"": "disk", "blocks.1": "cuda:0"},
        {"embed.weight": 0, "blocks": 0, "head": 0, "act": "cpu"},
        {"embed": 0, "blocks": 0, "blocks.1": 0, "blocks.1.norm1": 0, "head": 0},
    ],
)
def test_maps_that_are_right(device_map: dict[str, int | str | torch.device]) -> None:
    check_device_map(model(), device_map)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_inferred_is_right(tied: bool) -> None:
    for memory in ({0: 700, 1: 900, "cpu": 1000}, {0: "1MB"}, {"cpu": 900}):
        for clean in (False, True):
            given: Any = memory
            small = infer_auto_device_map(model(tied=tied), given, clean_result=clean, dtype="float16")
            check_device_map(model(tied=tied), small, max_memory=given, dtype="float16")


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({}, "is no mapping from names"),
        ("auto", "is no mapping from names"),
        ({0: 0}, "the key 0, which is no name"),
        ({"": "gpu"}, r"`device_map\[''\]` names 'gpu', which is no place.*Use the index"),
        ({"": -1}, "names -1, which is no place"),
        ({"embed": 0, "block": 0, "head": 0}, r"places 'block', but the Model has no module.*Did you mean 'blocks'\?"),
        ({"embed": 0}, "says nothing about `blocks.0`, `blocks.1`, `blocks.2` and 1 more.*Add it"),
        ({"blocks": 0, "head": 0}, "says nothing about `embed`"),
        (
            {"": 0, "blocks.1.linear1": 1},
            r"puts `blocks.1.\S+` on 0 and `blocks.1.linear1.weight` on 1.*TransformerEncoderLayer is not split",
        ),
        ({"embed": 0, "head": 0, "blocks.0": 0, "blocks.1": 0, "blocks.2.norm1": 0}, "parts of `blocks.2` .*but not `"),
    ],
)
def test_maps_that_are_wrong(device_map: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_device_map(model(), device_map)


def test_what_may_be_split_is_what_the_user_says() -> None:
    split: dict[str, int | str | torch.device] = {"": 0, "blocks.1.linear1": 1}
    check_device_map(model(), split, no_split_module_classes=[])
    with pytest.raises(ConfigError, match="a Linear is not split"):
        check_device_map(model(), {"": 0, "blocks.1.linear1.bias": 1}, no_split_module_classes=[])


def test_ties_that_are_torn() -> None:
    with pytest.raises(ConfigError, match=r"`embed.weight` on 0, `head.weight` on 'cpu', but these are one tensor"):
        check_device_map(model(tied=True), WHOLE)
    with pytest.raises(ConfigError, match="these are one tensor"):
        check_device_map(model(), WHOLE, tied_parameters=[["embed.weight", "head.weight"]])


def test_budgets_that_are_exceeded() -> None:
    memory: dict[int | str, int | str] = {0: 1000, 1: 1000, "cpu": 1000}
    with pytest.raises(
        ConfigError, match=r"puts 2.02 KiB of weights on device 1, .*gives it 1000 B.*`blocks.0`.*Move layers for"
    ):
        check_device_map(model(), WHOLE, max_memory=memory)
    with pytest.raises(ConfigError, match="uses device 1, for which `max_memory` gives no size"):
        check_device_map(model(), WHOLE, max_memory={0: 1000, "cpu": 1000})
    with pytest.raises(ConfigError, match="of slots for streamed layers on device 0"):
        check_device_map(model(), WHOLE, max_memory={0: 200, 1: 9000, "cpu": 1000})
    with pytest.raises(ConfigError, match="of activations"):
        check_device_map(
            model(), {"": 0}, max_memory={0: 4000}, workload=Workload(sequence_length=1000, kv_cache=False)
        )


def test_the_main_device_has_to_compute() -> None:
    check_device_map(model(), {"": "cpu"}, main_device=0)
    check_device_map(model(), {"": "disk"}, main_device="cpu")
    with pytest.raises(ConfigError, match=r"beside accelerators it only keeps weights.*Use one of 0, 1"):
        check_device_map(model(), WHOLE, main_device="cpu")
