"""What a map costs, as a table, as numbers, and drawn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from accel_bigmodel.init import init_empty_weights
from accel_bigmodel.placing import (
    DeviceSpeed,
    Explanation,
    Machine,
    Workload,
    explain_device_map,
    infer_auto_device_map,
    plan_model,
)
from accel_bigmodel.placing.shown import format_seconds
from accel_state.errors import ConfigError


class Model(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(1024, 64)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 256) for _ in range(8))
        self.head = nn.Linear(64, 1024, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


MEMORY: dict[int | str, int | str] = {0: "1100KiB", 1: "400KiB", "cpu": "2MiB"}
WORK = Workload(batch_size=2, sequence_length=16)


def model(*, tied: bool = True) -> Model:
    with init_empty_weights():
        return Model(tied=tied)


def explained() -> Explanation:
    found = infer_auto_device_map(model(), MEMORY, workload=WORK)
    return explain_device_map(model(), found, MEMORY, workload=WORK)


def test_a_table_with_a_line_for_each_place_and_what_was_assumed() -> None:
    lines = str(explained()).splitlines()
    assert lines[0].split() == [
        "device", "layers", "weights", "KV", "cache", "activations", "staging", "in", "all", "budget", "share",
        "seconds",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "cpu"]
    assert lines[1].split()[1].startswith("embed")
    assert "copying" in lines[3]
    assert not lines[4]
    text = "\n".join(lines[5:])
    assert "Tied, kept together and counted once: embed.weight/head.weight." in text
    assert "predicted, bound by" in text
    assert "streamed to device 0" in text
    assert "bus 50 GB/s" in text


def test_the_explanation_of_an_inferred_map_is_that_of_its_plan() -> None:
    plan = plan_model(model(), MEMORY, workload=WORK)
    assert explained().to_dict() == Explanation(plan=plan, title="Model").to_dict()


def test_a_map_that_exceeds_budgets_is_shown_as_such() -> None:
    over = explain_device_map(model(), {"": 1}, MEMORY)
    assert "does not fit" in over.to_svg()
    assert not over.to_dict()["fits"]
    with pytest.raises(ConfigError, match="says nothing about"):
        explain_device_map(model(), {"embed": 0, "head": 0}, MEMORY)


def test_numbers_for_programs() -> None:
    numbers = json.loads(json.dumps(explained().to_dict()))
    assert numbers["device_map"] == infer_auto_device_map(model(), MEMORY, workload=WORK)
    assert sum(len(place["layers"]) for place in numbers["places"]) == numbers["num_layers"] == 10
    assert numbers["places"][-1]["budget_bytes"] is None
    assert numbers["main_device"] == 0
    assert numbers["fits"] is True


def test_without_a_workload_that_is_said() -> None:
    assert "no workload was given" in str(explain_device_map(model(), {"": 0}))


def test_a_picture_is_xml_with_every_place_and_escapes_names() -> None:
    odd = Explanation(plan=explained().plan, title="<script>alert('&')</script>")
    picture = odd.to_svg()
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "<script>alert('&')</script>"
    assert {"device 0", "device 1", "cpu"} <= set(texts)
    assert "<script>" not in picture
    widths = [float(each.attrib["width"]) for each in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert max(widths) <= 960
    titles = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(each.startswith("weights, ") and "blocks" in each for each in titles)
    assert any(each.startswith("staging, ") for each in titles)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_page_holds_all_it_needs() -> None:
    page = Explanation(plan=explained().plan, title="<b>").to_html()
    tags = _Tags()
    tags.feed(page)
    names = [tag for tag, _ in tags.found]
    assert names.count("svg") == names.count("table") == 1
    assert not {"script", "link", "img", "iframe", "b"} & set(names)
    assert not any(key in ("src", "href") for _, attributes in tags.found for key in attributes)
    assert "&lt;b&gt;" in page
    assert names.count("tr") == 4


def test_times_are_of_the_speeds_given() -> None:
    slow = Machine(bus_gb_s=0.001, accelerator=DeviceSpeed(tflops=1000, memory_gb_s=10_000), overlap_loss=0.0)
    plan = plan_model(model(), MEMORY, workload=WORK, machine=slow)
    streamed = plan.prediction.streamed_bytes
    assert streamed
    assert plan.prediction.seconds == pytest.approx(streamed / 1e6, rel=0.01)
    assert "bus 0.001 GB/s" in str(Explanation(plan=plan))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (1.234, "1.23 s"), (0.0123, "12.3 ms"), (5e-6, "5 us")])
def test_seconds_as_text(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bus_gb_s": 0}, "`bus_gb_s=0` is no speed"),
        ({"disk_gb_s": float("nan")}, "`disk_gb_s=nan`"),
        ({"staging_slots": 0}, "holds no layer"),
        ({"overlap_loss": 2}, "no part of a whole"),
        ({"devices": {"gpu": DeviceSpeed(tflops=1, memory_gb_s=1)}}, "`devices` names 'gpu'"),
    ],
)
def test_machines_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Machine(**settings)  # type: ignore[arg-type]


def test_names_from_files_are_made_printable() -> None:
    from xml.etree import ElementTree

    module = nn.Module()
    module.register_module("\x01\x1b[31mred", nn.Linear(4, 4))
    explanation = explain_device_map(module, {"": "cpu"})
    assert "\x1b" not in str(explanation)
    ElementTree.fromstring(explanation.to_svg())
