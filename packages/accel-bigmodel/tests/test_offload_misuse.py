"""What people do to offloaded models without thinking of it: done right, or refused by name, never silently wrong."""

from __future__ import annotations

import copy
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel.loading import load_checkpoint_in_model
from accel_bigmodel.offload.access import align_module_device
from accel_bigmodel.offload.division import group_tensors, travelling
from accel_bigmodel.offload.handover import hand_over
from accel_bigmodel.offload.hooks import units_of
from accel_bigmodel.offload.offloading import disk_offload, remove_hooks, to_disk
from accel_bigmodel.offload.placeholder import Placeholder
from accel_bigmodel.offload.streaming import stream_tensors
from accel_bigmodel.stored import read_index
from accel_bigmodel.testing import FakeTransfers, save_file
from accel_state.errors import ConfigError

ROWS = torch.arange(12.0).view(3, 4) / 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(rows)
        for block in self.blocks:
            hidden = block(hidden)
        out: torch.Tensor = self.head(hidden)
        return out


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def offloaded(model: nn.Module | None = None, *, buffers: bool = False, num_slots: int = 3) -> Any:
    model = make() if model is None else model
    tensors = travelling(group_tensors(model), offload_buffers=buffers)
    stream_tensors(model, tensors, {}, transfers=FakeTransfers(), num_slots=num_slots)
    return model


def test_a_weight_that_is_read_without_its_module_is_refused_and_never_garbage() -> None:
    """torch gives memory that nobody wrote where a weight is on the meta device and no gradients are wanted."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.first(rows) + nn.functional.linear(rows, self.second.weight)

    model = offloaded(Reads())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), pytest.raises(ConfigError, match=r"`second\.weight` was to be used.*preload_module_classes"):
            model(ROWS)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
        lambda model: nn.init.zeros_(model.head.weight),
        lambda model: model.blocks[0][0].bias.data.add_(1),
        lambda model: setattr(model.blocks[0][0].bias, "data", torch.ones(4)),
        lambda model: nn.utils.parametrizations.weight_norm(model.blocks[0][0]),
        lambda model: model.to_empty(device="cpu") and model.head.weight.sum(),
    ],
)
def test_changes_that_would_go_nowhere_are_refused(change: Any) -> None:
    model = offloaded()
    with torch.no_grad(), pytest.raises((ConfigError, RuntimeError), match=r"offloaded|Placeholder"):
        change(model)


def test_weights_say_where_they_compute() -> None:
    model = offloaded()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert repr(model.head.weight) == "Placeholder('embed.weight', shape=[4, 4], dtype=torch.float32, device='cpu')"
    assert torch.zeros_like(model.head.weight).tolist() == [[0.0] * 4] * 4


def test_what_is_put_in_the_place_of_a_weight_counts() -> None:
    model, plain = offloaded(), make()
    for each in (model, plain):
        each.blocks[1][0].weight = nn.Parameter(torch.eye(4))
        each.blocks[2][0].bias = None
    with torch.no_grad():
        assert torch.equal(model(ROWS), plain(ROWS))
        assert torch.equal(model(ROWS), plain(ROWS))
        given = {"blocks.0.0.weight": torch.full((4, 4), 0.5)}
        called = torch.func.functional_call(model, given, (ROWS,))
        assert torch.equal(called, torch.func.functional_call(plain, given, (ROWS,)))
        assert torch.equal(model(ROWS), plain(ROWS))
    assert torch.equal(model.state_dict()["blocks.1.0.weight"], torch.eye(4))
    remove_hooks(model)
    assert torch.equal(model(ROWS), plain(ROWS))


def test_modules_may_be_replaced() -> None:
    model, plain = offloaded(), make()
    for each in (model, plain):
        torch.manual_seed(5)
        each.head = nn.Linear(4, 2)
        each.blocks[1][0] = nn.Linear(4, 4)
    part = copy.deepcopy(model.embed)
    with torch.no_grad():
        assert torch.equal(model(ROWS), plain(ROWS))
        assert torch.equal(part(ROWS), plain.embed(ROWS))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("where", ["blocks.1.1", "head", "blocks.0.0"])
def test_an_interrupt_in_a_forward_is_mended_by_the_next(where: str, grad: bool) -> None:
    model, plain = offloaded(), make()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.set_grad_enabled(grad):
        handle = model.get_submodule(where).register_forward_pre_hook(interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(ROWS)
        handle.remove()
        assert torch.equal(model(ROWS), plain(ROWS))
    assert all(isinstance(parameter, Placeholder) for parameter in model.parameters())
    assert not any(unit.is_entered for unit in units_of(model))
    torch.func.grad(lambda rows: rows.square().sum())(ROWS)  # nothing looks at saved tensors any more
    model.load_state_dict({name: 2 * value for name, value in make().state_dict().items()})
    plain.load_state_dict({name: 2 * value for name, value in make().state_dict().items()})
    with torch.no_grad():
        assert torch.equal(model(ROWS), plain(ROWS))


def test_removing_from_a_part_gives_back_all_that_hangs_on_it() -> None:
    model = offloaded()
    remove_hooks(model.head)
    assert model.head.weight is model.embed.weight
    assert not isinstance(model.head.weight, Placeholder)
    assert isinstance(model.blocks[0][0].weight, Placeholder)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ROWS), make()(ROWS))


def test_what_wants_gradients_may_change_afterwards() -> None:
    model = make().requires_grad_(False)
    offloaded(model)
    model.blocks[1].requires_grad_(True)
    with pytest.raises(ConfigError, match=r"A gradient for `blocks\.1\.0\.\w+` was to be computed"):
        model(ROWS).sum().backward()
    model.blocks[1].requires_grad_(False)
    remove_hooks(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_changes_are_kept_that_torch_does_not_count() -> None:
    model = offloaded()
    with align_module_device(model):
        assert all(type(parameter) is nn.Parameter and parameter.is_leaf for parameter in model.parameters())
        model.blocks[0][0].weight.data.fill_(3)
        model.blocks[1][0].weight.data = torch.full((4, 4), 4.0)
        model.blocks[2][0].weight.detach().numpy()[:] = 5
        model.load_state_dict({"blocks.2.0.bias": torch.full((4,), 6.0)}, strict=False)
    state = model.state_dict()
    assert [int(state[f"blocks.{n}.0.weight"][0, 0]) for n in range(3)] == [3, 4, 5]
    assert state["blocks.2.0.bias"].tolist() == [6.0] * 4
    for value in model.state_dict().values():
        value.zero_()
    with torch.no_grad():
        assert model(ROWS).abs().sum() == 0


def test_looking_at_weights_in_a_file_copies_none_of_them(tmp_path: Path) -> None:
    model = make()
    save_file({each.name: each.value.detach() for each in group_tensors(model)}, tmp_path / "model.safetensors")
    stream_tensors(model, group_tensors(model), dict(read_index(tmp_path)), transfers=FakeTransfers())
    with align_module_device(model), torch.no_grad():
        assert model.blocks[0][0].weight.abs().sum() > 0
        model.blocks[2][0].bias.data[1] = 7
    changed = {unit.name: list(unit.source._changed) for unit in units_of(model)}  # type: ignore[attr-defined]
    assert [name for name, held in changed.items() if held] == ["blocks.2"]
    assert len(changed["blocks.2"]) == 1
    assert model.state_dict()["blocks.2.0.bias"][1] == 7
    for unit in units_of(model):
        unit.engine.close()


class Buffered(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change
        self.inner = nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(2, 3, dtype=torch.int32))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.change(self)
        return self.inner(rows)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module, "kept", module.kept + 1.5),
        lambda module: setattr(module, "kept", module.kept.t()),
        lambda module: setattr(module, "kept", torch.cat([module.kept, module.kept])),
        lambda module: setattr(module, "kept", None),
    ],
)
def test_buffers_that_become_something_else_are_refused(change: Any) -> None:
    model = offloaded(Buffered(change), buffers=True)
    with torch.no_grad(), pytest.raises(ConfigError, match=r"replaced `kept`.*offload_buffers=False"):
        model(ROWS)
    assert not any(unit.is_entered for unit in units_of(model))
    assert model.state_dict()["kept"].tolist() == [[1] * 3] * 2


def test_sparse_buffers_stay_where_they_are() -> None:
    model = Buffered(lambda _: None)
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    offloaded(model, buffers=True)
    model(ROWS)
    assert model.sparse.is_sparse


def test_backward_behind_a_change_is_refused() -> None:
    model = make().requires_grad_(False)
    model.blocks[0][0].bias.requires_grad_(True)
    offloaded(model)
    loss = model(ROWS).sum()
    model.load_state_dict({"blocks.2.0.weight": torch.ones(4, 4)}, strict=False)
    with pytest.raises(RuntimeError, match=r"'blocks\.2'.*changed since the forward"):
        loss.backward()
    model(ROWS).sum().backward()


def test_a_model_that_waits_on_the_device_is_told_what_is_wanted_of_gradients() -> None:
    model = make()
    hook = hand_over(model, torch.device("cpu"), FakeTransfers(), None)
    with torch.no_grad():
        model(ROWS)
    with pytest.raises(ConfigError, match="A gradient for"):
        model(ROWS).sum().backward()
    with torch.no_grad():
        assert torch.equal(model(ROWS), make()(ROWS))
    model.load_state_dict({name: 2 * value for name, value in make().state_dict().items()})
    plain = make()
    plain.load_state_dict({name: 2 * value for name, value in plain.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(model(ROWS), plain(ROWS))
        hook.offload()
        assert torch.equal(model(ROWS), plain(ROWS))
    hook.remove()


def test_loading_into_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    save_file(make().state_dict(), tmp_path / "model.safetensors")
    model = offloaded()
    with pytest.raises(ConfigError, match="offloaded already"):
        load_checkpoint_in_model(model, tmp_path)


def on_disk(folder: Path) -> Any:
    model = make()
    tensors = group_tensors(model)
    values: dict[str, Any] = {}
    file = to_disk(tensors, values, folder)
    stream_tensors(model, tensors, values, transfers=FakeTransfers(), keep=file)
    return model


def test_a_forked_process_removes_nothing(tmp_path: Path) -> None:
    held = [on_disk(tmp_path)]  # nothing else refers to the model, so that clearing the list is its end
    (path,) = tmp_path.iterdir()
    process = multiprocessing.get_context("fork").Process(target=held.clear)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert path.exists()
    with torch.no_grad():
        assert torch.equal(held[0](ROWS), make()(ROWS))
    for unit in units_of(held[0]):
        unit.engine.close()
    del unit
    held.clear()
    assert not path.exists()


def test_a_relative_folder_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = disk_offload(make(), "folder", "cpu")
    os.chdir("/")
    with torch.no_grad():
        assert torch.equal(model(ROWS), make()(ROWS))


@pytest.mark.parametrize("pinned_memory", [None, 0])
def test_a_default_device_is_not_where_the_host_is(pinned_memory: int | None) -> None:
    model = make()
    with torch.device("meta"):
        stream_tensors(
            model, group_tensors(model), {}, transfers=FakeTransfers(), pinned_memory=pinned_memory
        )  # fmt: skip
        with torch.no_grad():
            found = model(ROWS)
    assert torch.equal(found, make()(ROWS))
    for unit in units_of(model):
        unit.engine.close()
