"""Generators: seeded alike or apart, stored as plain values, put to one state."""

from __future__ import annotations

import json
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from accel_state import (
    DEVICES,
    ConfigError,
    Process,
    ProcessSettings,
    rng_state,
    set_rng_state,
    set_seed,
    synchronize_rng_states,
)
from accel_state.testing import run_ranks


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    """Leave the generators, and torch's choice of algorithms, as they were."""
    before = rng_state()
    yield
    set_rng_state(before)
    torch.use_deterministic_algorithms(False)


def draw() -> list[float]:
    values = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    return [*values, *torch.rand(3).tolist(), *torch.randn(3).tolist()]


def test_one_seed_gives_one_sequence() -> None:
    assert set_seed(7) == 7
    first = draw()
    set_seed(7)
    assert draw() == first
    set_seed(8)
    assert draw() != first


def test_deterministic_algorithms_on_request() -> None:
    set_seed(1)
    assert not torch.are_deterministic_algorithms_enabled()
    set_seed(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "1"])
def test_seeds_outside_the_range(seed: Any) -> None:
    with pytest.raises(ConfigError, match="is not a whole number from 0 to 4294967295"):
        set_seed(seed)


def test_every_present_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    fake = types.ModuleType("xpu")
    fake.is_available = lambda: True  # type: ignore[attr-defined]
    fake.manual_seed_all = seeds.append  # type: ignore[attr-defined]
    fake._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "xpu", fake)
    set_seed(3)
    assert 3 in seeds
    assert "torch_npu" not in sys.modules


def test_state_is_json_and_tensors_and_round_trips_bitwise() -> None:
    set_seed(11)
    draw()  # leaves a second normal number waiting, in random and in numpy
    state = rng_state()
    tensors = {"torch": state.pop("torch")}
    assert tensors["torch"].dtype == torch.uint8
    stored = {**json.loads(json.dumps(state)), **tensors}
    expected = draw()
    draw()
    set_rng_state(stored)
    assert draw() == expected


class FakeDevice:
    def __init__(self) -> None:
        self.state = torch.tensor([1], dtype=torch.uint8)

    def get_rng_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def set_device(self, device: torch.device) -> None: ...


def test_the_device_generator_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevice()
    monkeypatch.setattr(torch, "xpu", fake)
    with Process.open(ProcessSettings(device="xpu")):
        state = rng_state()
        assert state["device"]["type"] == "xpu"
        fake.state = torch.tensor([2], dtype=torch.uint8)
        set_rng_state(state)
        assert fake.state.tolist() == [1]
    with Process.open(ProcessSettings(device="cpu")):
        with pytest.raises(ConfigError, match=r"taken on `xpu`, and this process computes on `cpu`"):
            set_rng_state(state)
        set_rng_state(state, strict_device=False)
        assert rng_state(DEVICES["xpu"])["device"]["state"].tolist() == [1]


def test_incomplete_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks numpy, torch"):
        set_rng_state({"python": [], "device": {}})


def synchronised(kinds: list[Any]) -> list[Any]:
    rank = Process.current().topology.rank
    generator = torch.Generator().manual_seed(100 + rank)
    used = set_seed(5, device_specific=True)
    synchronize_rng_states(kinds, generator if "generator" in kinds else None)
    return [used, torch.rand(1).item(), random.random(), np.random.rand(), torch.rand(1, generator=generator).item()]


@pytest.mark.parametrize(
    ("kinds", "alike"),
    [
        (["torch", "generator"], [False, True, False, False, True]),
        (["python", "numpy"], [False, False, True, True, False]),
    ],
)
def test_ranks_are_seeded_apart_and_put_to_one_state(kinds: list[str], alike: list[bool]) -> None:
    first, second = run_ranks(synchronised, 2, kinds)
    assert [a == b for a, b in zip(first, second, strict=True)] == alike
    assert (first[0], second[0]) == (5, 6)


def test_synchronising_what_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'cuda' is no kind of generator"):
        synchronize_rng_states(["cuda"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no generator was given"):
        synchronize_rng_states(["generator"])
    state = torch.get_rng_state()
    synchronize_rng_states(["torch", "device"])
    assert torch.equal(torch.get_rng_state(), state)
