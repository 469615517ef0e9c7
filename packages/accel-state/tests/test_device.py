"""Every row of the device table, with fakes for the devices that no test machine has."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch

from accel_state import DEVICES, ConfigError, DeviceKind, MissingDependencyError, Process, ProcessSettings
from accel_state.device import available_kind, device_kind, select_device

INDEXED = [kind for kind in DEVICES.values() if kind.indexed and kind.type != "xla"]
WITH_PLUGIN = [kind for kind in DEVICES.values() if kind.plugin is not None]


def fake_module(name: str, **functions: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    for key, value in functions.items():
        setattr(module, key, value)
    return module


def install(monkeypatch: pytest.MonkeyPatch, kind: DeviceKind, count: int, **functions: Any) -> None:
    """Let torch see `count` devices of this kind."""
    if kind.plugin is not None:
        parts = kind.plugin.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, fake_module(name))
    module = fake_module(kind.type, is_available=lambda: count > 0, device_count=lambda: count, **functions)
    monkeypatch.setattr(torch, kind.type, module, raising=False)
    # A name that torch does not have yet cannot be a torch.device without its plugin.
    if kind.type in ("npu", "hpu", "mlu", "musa", "sdaa", "neuron"):
        monkeypatch.setattr(torch, "device", lambda name, index=None: f"{name}:{index}")


@pytest.mark.parametrize("kind", INDEXED, ids=lambda kind: kind.type)
def test_each_process_takes_the_device_of_its_local_rank(kind: DeviceKind, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kind, 4)
    found, device = select_device(kind.type, local_rank=2, local_world_size=4)
    assert found is kind
    assert str(device) == f"{kind.type}:2"
    assert kind.count() == 4


@pytest.mark.parametrize("kind", INDEXED, ids=lambda kind: kind.type)
def test_more_processes_than_devices(kind: DeviceKind, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kind, 2)
    with pytest.raises(ConfigError, match=rf"3 processes were launched .* has 2 `{kind.type}`"):
        select_device(kind.type, local_rank=2, local_world_size=3)


@pytest.mark.parametrize("kind", WITH_PLUGIN, ids=lambda kind: kind.type)
def test_missing_plugin_gives_the_install_line(kind: DeviceKind) -> None:
    assert not kind.is_available()
    assert kind.count() == 0
    with pytest.raises(MissingDependencyError, match=f"pip install {kind.distribution or kind.plugin}"):
        select_device(kind.type)


def test_absent_device_names_one_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DEVICES["cuda"], 0)
    with pytest.raises(ConfigError, match=r"torch .* sees no such device"):
        select_device("cuda")


def test_unknown_device() -> None:
    with pytest.raises(ConfigError, match=r"device='cud'` is not a device type known here\. Did you mean 'cuda'"):
        device_kind("cud")


def test_cpu_serves_any_number_of_processes() -> None:
    kind, device = select_device("cpu", local_rank=63, local_world_size=64)
    assert (kind.type, device, kind.module, kind.count()) == ("cpu", torch.device("cpu"), None, 1)
    assert kind.call("empty_cache", default=3) == 3


def test_the_first_available_row_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DEVICES["xpu"], 1)
    install(monkeypatch, DEVICES["cuda"], 0)
    assert available_kind().type == "xpu"
    install(monkeypatch, DEVICES["cuda"], 1)
    assert select_device(None)[0].type == "cuda"


def test_mps_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    kind, device = select_device("mps", local_rank=1, local_world_size=2)
    assert (device, kind.count()) == (torch.device("mps"), 1)


def test_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    names = {name: fake_module(name) for name in ("torch_xla", "torch_xla.core")}
    names["torch_xla.core.xla_model"] = fake_module("torch_xla.core.xla_model", set_rng_state=seeds.append)
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    kind, device = select_device("xla", local_rank=1, local_world_size=2)
    kind.call(kind.seed_function, 5)
    assert (device.type, device.index, kind.count(), seeds) == ("xla", None, 1, [5])


def test_opening_sets_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    install(monkeypatch, DEVICES["cuda"], 1, set_device=chosen.append)
    with Process.open(ProcessSettings(device="cuda")) as process:
        assert process.distributed_type.value == "NO"
        assert chosen == [torch.device("cuda", 0)]


def test_every_label_is_a_distributed_type() -> None:
    from accel_state import DistributedType

    for kind in DEVICES.values():
        if kind.type != "xla":
            assert DistributedType(f"MULTI_{kind.label}")
