"""What modules keep besides their tensors is loaded with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights, load_checkpoint_and_dispatch
from accel_bigmodel.loading import load_checkpoint_in_model
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError
from accel_state.testing import run_ranks


class Scaled(nn.Module):
    """Remembers scales, as modules of 8-bit floating point do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scales = torch.zeros(2)

    def get_extra_state(self) -> torch.Tensor:
        return self.scales

    def set_extra_state(self, state: torch.Tensor) -> None:
        if state.min() < 0:
            raise ValueError("scales are positive")
        self.scales = state

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(inputs) * self.scales.sum()
        return found


class Following(Scaled):
    """Keeps its state where its weight is, and in the weight's dtype."""

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scales = state.to(self.linear.weight.device, self.linear.weight.dtype)


class Net(nn.Module):
    def __init__(self, kind: type[Scaled] = Scaled) -> None:
        super().__init__()
        self.first = kind()
        self.again = self.first
        self.last = kind()


def trained() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.first.scales, net.last.scales = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    return net


def saved(folder: Path, **changed: torch.Tensor | None) -> Path:
    """As savers do, each module once."""
    state = {name: each for name, each in trained().state_dict().items() if not name.startswith("again")}
    state.update({name.replace("__", "."): each for name, each in changed.items() if each is not None})
    for name in [name for name, each in changed.items() if each is None]:
        del state[name.replace("__", ".")]
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def empty(kind: type[Scaled] = Scaled) -> Any:
    with init_empty_weights():
        return Net(kind)


@pytest.mark.parametrize("strict", [True, False])
def test_it_is_loaded_from_both_kinds_of_files(tmp_path: Path, strict: bool) -> None:
    torch.save(trained().state_dict(), tmp_path / "model.bin")
    for path in (saved(tmp_path), tmp_path / "model.bin"):
        net = empty()
        result = load_checkpoint_in_model(net, path, strict=strict)
        assert (net.first.scales.tolist(), net.last.scales.tolist()) == ([1.0, 2.0], [3.0, 4.0])
        assert not result.missing
        assert not result.unexpected


@pytest.mark.parametrize("make", [empty, Net])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_modules_see_where_their_tensors_came_to_be(tmp_path: Path, make: Any, dtype: torch.dtype | None) -> None:
    net = make(Following)
    load_checkpoint_in_model(net, saved(tmp_path), dtype=dtype)
    assert (net.first.scales.tolist(), net.last.scales.tolist()) == ([1.0, 2.0], [3.0, 4.0])
    assert net.first.scales.dtype == net.first.linear.weight.dtype == (dtype or torch.float32)


def test_on_disk_too_it_is_in_memory(tmp_path: Path) -> None:
    net = load_checkpoint_and_dispatch(empty(), saved(tmp_path), {"": "disk"})
    inputs = torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(net.last(inputs), trained().last(inputs))


def test_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, last___extra_state=None)
    with pytest.raises(CheckpointError, match=r"1 of the model's tensors are not in it: `last._extra_state`"):
        load_checkpoint_in_model(empty(), path)
    net = empty()
    assert load_checkpoint_in_model(net, path, strict=False).missing == ("last._extra_state",)
    assert net.last.scales.tolist() == [0.0, 0.0]
    assert net.first.scales.tolist() == [1.0, 2.0]


def test_one_that_no_module_takes_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, last__linear___extra_state=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"1 of its .* are not in the model: `last.linear._extra_state`"):
        load_checkpoint_in_model(empty(), path)


def test_one_module_stored_with_two_states_loses_none_unseen(tmp_path: Path) -> None:
    path = saved(tmp_path, again___extra_state=torch.tensor([1.0, 9.0]))
    with pytest.raises(CheckpointError, match=r"`first._extra_state` and `again._extra_state` are one tensor"):
        load_checkpoint_in_model(empty(), path)


def test_what_a_module_says_against_it_is_heard(tmp_path: Path) -> None:
    path = saved(tmp_path, first___extra_state=torch.tensor([-1.0, 2.0]))
    with pytest.raises(ValueError, match="scales are positive"):
        load_checkpoint_in_model(empty(), path)


class OnlyOnRank0(Scaled):
    def set_extra_state(self, state: torch.Tensor) -> None:
        if torch.distributed.get_rank() == 1:
            raise ValueError("not here")
        super().set_extra_state(state)


def refused_on_one(path: str) -> str:
    with pytest.raises((ValueError, CheckpointError)) as caught:
        load_checkpoint_in_model(empty(OnlyOnRank0), path, broadcast_from_rank0=True)
    return str(caught.value)


def test_every_rank_hears_what_a_module_says_on_one(tmp_path: Path) -> None:
    first, second = run_ranks(refused_on_one, 2, str(saved(tmp_path)))
    assert "Rank 1 could not load its part, so no rank has the whole model: ValueError: not here" in first
    assert second == "not here"


def loaded_by_all(path: str) -> list[float]:
    net = empty()
    load_checkpoint_in_model(net, path, broadcast_from_rank0=True)
    return [*net.first.scales.tolist(), *net.last.scales.tolist()]


def test_every_rank_gets_it(tmp_path: Path) -> None:
    assert run_ranks(loaded_by_all, 2, str(saved(tmp_path))) == [[1.0, 2.0, 3.0, 4.0]] * 2
