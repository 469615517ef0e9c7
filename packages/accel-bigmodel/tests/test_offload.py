"""Models whose weights are brought for each forward: the same results, and modules that are as good as any other."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from accel_bigmodel.offload.division import group_tensors
from accel_bigmodel.offload.hooks import units_of
from accel_bigmodel.offload.offloading import cpu_offload, has_offloaded_params, remove_hooks
from accel_bigmodel.offload.placeholder import Placeholder
from accel_bigmodel.offload.streaming import stream_tensors
from accel_bigmodel.stored import read_index
from accel_bigmodel.testing import FakeTransfers, save_file
from accel_state.errors import ConfigError

Offload = Callable[..., FakeTransfers]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        found: torch.Tensor = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return found + self.mlp(self.norm(found))


class Model(nn.Module):
    """With a tied head, a parameter of its own, and a module that runs twice."""

    def __init__(self, width: int = 8, depth: int = 5, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.scale = nn.Parameter(torch.full((width,), 1.5))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) * self.scale
        for block in (*self.blocks, self.blocks[0]):
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.checkpointed else block(hidden)
        out: torch.Tensor = self.head(self.recurrent(hidden)[0])
        return out


def make(**arguments: Any) -> Model:
    torch.manual_seed(0)
    return Model(**arguments)


TOKENS = torch.arange(10).view(2, 5)


def resident() -> torch.Tensor:
    """What the model gives that is all on the device; some kernels differ where gradients are not wanted."""
    return make().eval()(TOKENS)  # type: ignore[no-any-return]


def offload(
    model: nn.Module,
    transfers: FakeTransfers | None = None,
    *,
    folder: Path | None = None,
    buffers: bool = False,
    num_slots: int = 3,
    pinned_memory: int | None = None,
) -> FakeTransfers:
    """As on an accelerator, with a stand-in for it."""
    transfers = transfers or FakeTransfers()
    values: dict[str, Any] = {}
    tensors = [each for each in group_tensors(model) if buffers or each.places[0].is_parameter]
    if folder is not None:
        save_file({each.name: each.value.detach() for each in tensors}, folder / "model.safetensors")
        values = dict(read_index(folder))
    stream_tensors(
        model, tensors, values, transfers=transfers, num_slots=num_slots, pinned_memory=pinned_memory
    )  # fmt: skip
    return transfers


def stop(model: nn.Module) -> None:
    for unit in units_of(model):
        unit.engine.close()


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("kind", ["pinned", "pageable", "file"])
def test_outputs_are_those_of_the_resident_model(tmp_path: Path, kind: str, num_slots: int) -> None:
    model = make().eval()
    transfers = offload(
        model, num_slots=num_slots, folder=tmp_path if kind == "file" else None,
        pinned_memory=0 if kind == "pageable" else None,
    )  # fmt: skip
    assert all(isinstance(parameter, Placeholder) for parameter in model.parameters())
    with transfers.watch():
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert torch.equal(model(TOKENS), resident())
    assert all(isinstance(parameter, Placeholder) for parameter in model.parameters())
    stop(model)


def test_tied_weights_are_one_unit_and_lie_once() -> None:
    model = make()
    transfers = offload(model)
    assert model.head.weight is model.embed.weight
    units = {unit.name: unit for unit in units_of(model)}
    assert [each for each in units if "+" in each] == ["embed + head"]
    assert len(units["embed + head"].tensors) == 1
    with transfers.watch(), torch.no_grad():
        model(TOKENS)
    assert model.head.weight is model.embed.weight
    state = model.state_dict()
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


@pytest.mark.parametrize("from_file", [False, True])
def test_states_are_complete_and_can_be_loaded(tmp_path: Path, from_file: bool) -> None:
    expected = make().state_dict()
    model = make()
    transfers = offload(model, folder=tmp_path if from_file else None)
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with torch.no_grad():
        model(TOKENS)
    torch.manual_seed(1)
    other = Model().eval()
    missing, unexpected = model.load_state_dict(other.state_dict())
    assert (missing, unexpected) == ([], [])
    with transfers.watch(), torch.no_grad():
        assert torch.equal(model.eval()(TOKENS), other(TOKENS))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items())
    broken = dict(other.state_dict(), scale=torch.zeros(3))
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        model.load_state_dict(broken)
    stop(model)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    with torch.no_grad():
        expected = resident()
    model = make().eval()
    transfers = offload(model)
    with torch.no_grad():
        model(TOKENS)
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.embed.weight
    with torch.no_grad():
        for parameter in ("scale",):
            model.load_state_dict({parameter: torch.zeros(8)}, strict=False)
        with transfers.watch():
            assert torch.equal(copied(TOKENS), expected)
            assert not torch.equal(model(TOKENS), expected)
    del model
    with transfers.watch(), torch.no_grad():
        assert torch.equal(copied(TOKENS), expected)
    block = copy.deepcopy(copied.blocks[1])
    with transfers.watch(), torch.no_grad():
        assert block(torch.ones(1, 2, 8)).shape == (1, 2, 8)


def test_pickling_is_refused_with_a_reason() -> None:
    model = make()
    offload(model)
    with pytest.raises(ConfigError, match="cannot be pickled: streams"):
        pickle.dumps(model)
    with pytest.raises(ConfigError, match=r"Save its `state_dict\(\)`"):
        torch.save(model, io.BytesIO())


def test_deleting_the_model_frees_everything_at_once() -> None:
    model = make()
    transfers = offload(model)
    with torch.no_grad():
        model(TOKENS)
        model(TOKENS)
    assert transfers.held_bytes > 0
    host = weakref.ref(units_of(model)[1].source)
    module = weakref.ref(model.blocks[1])
    gc.disable()
    try:
        del model
        assert (host(), module()) == (None, None)
        assert transfers.held_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_gradients_of_what_is_trained_are_those_of_the_resident_model(checkpointed: bool, num_slots: int) -> None:
    """Frozen weights are offloaded; adapters inside the blocks are not. Backward passes the blocks the other way."""

    def trained(offloaded: bool) -> tuple[dict[str, torch.Tensor], FakeTransfers | None]:
        model = make(checkpointed=checkpointed).double().eval()
        model.requires_grad_(False)
        for block in model.blocks:
            block.mlp.append(nn.Linear(8, 8).double())
        transfers = None
        if offloaded:
            transfers = FakeTransfers()
            frozen = [
                each for each in group_tensors(model) if each.places[0].is_parameter and not each.value.requires_grad
            ]
            stream_tensors(model, frozen, {}, transfers=transfers, num_slots=num_slots)
        for _ in range(3):
            if transfers is None:
                model(TOKENS).square().sum().backward()
            else:
                with transfers.watch():
                    model(TOKENS).square().sum().backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}, transfers

    expected, _ = trained(offloaded=False)
    got, transfers = trained(offloaded=True)
    assert transfers is not None
    assert got.keys() == expected.keys()
    assert len(got) == 10
    assert all(torch.equal(got[name], expected[name]) for name in got)
    block_bytes = 8 * (4 * 8 * 8 + 4 * 8 + 2 * 8 + 2 * 16 * 8 + 24) + 20 * 512
    # The graph keeps no weights: what is alive is what a forward alone would need, and what a node of backward holds.
    assert transfers.peak_bytes < (num_slots + 2) * block_bytes


def test_the_graph_of_a_forward_keeps_no_weights_on_the_device() -> None:
    model = make().requires_grad_(False)
    model.scale.requires_grad_(True)
    transfers = FakeTransfers()
    frozen = [each for each in group_tensors(model) if each.places[0].is_parameter and not each.value.requires_grad]
    stream_tensors(model, frozen, {}, transfers=transfers, num_slots=1)
    loss = model(TOKENS).sum()
    engine = units_of(model)[0].engine
    held = transfers.held_bytes
    assert held <= engine.budget_bytes
    loss.backward()
    assert model.scale.grad is not None


def test_weights_that_want_gradients_are_refused_in_backward() -> None:
    model = make()
    offload(model)
    loss = model(TOKENS).sum()
    with pytest.raises(ConfigError, match=r"A gradient for `.*` was to be computed, but that weight is offloaded"):
        loss.backward()


@pytest.mark.parametrize("kind", ["pinned", "file"])
def test_buffers_that_a_forward_changes_are_kept(tmp_path: Path, kind: str) -> None:
    model = make().eval()
    transfers = offload(model, buffers=True, folder=tmp_path if kind == "file" else None, num_slots=1)
    for mode in (torch.no_grad, torch.inference_mode):
        with transfers.watch(), mode():
            model(TOKENS)
    state = model.state_dict()
    assert [int(state[f"blocks.{number}.calls"]) for number in range(5)] == [4, 2, 2, 2, 2]

    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(3))
            self.inner = nn.Linear(3, 3)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            self.total = self.total + rows.sum(0)
            out: torch.Tensor = self.inner(rows)
            return out

    replaces = Replaces()
    transfers = offload(replaces, buffers=True)
    for _ in range(3):
        with transfers.watch(), torch.no_grad():
            replaces(torch.ones(2, 3))
    assert replaces.state_dict()["total"].tolist() == [6, 6, 6]
    stop(model)


def test_an_exception_in_a_forward_leaves_nothing_behind() -> None:
    model = make().eval()
    with torch.no_grad():
        expected = resident()
    transfers = offload(model)
    model.blocks[2].mlp[1].register_forward_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            model(TOKENS)
        assert all(isinstance(parameter, Placeholder) for parameter in model.parameters())
    model.blocks[2].mlp[1]._forward_hooks.clear()
    with transfers.watch(), torch.no_grad():
        assert torch.equal(model(TOKENS), expected)


def test_files_that_are_replaced_or_removed_stay_what_they_were(tmp_path: Path) -> None:
    model = make().eval()
    with torch.no_grad():
        expected = resident()
    offload(model, folder=tmp_path, num_slots=1)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), expected)
        path = tmp_path / "model.safetensors"
        path.rename(tmp_path / "elsewhere")
        save_file({name: torch.zeros_like(value) for name, value in make().named_parameters()}, path)
        assert torch.equal(model(TOKENS), expected)
        path.unlink()
        (tmp_path / "elsewhere").unlink()
        assert torch.equal(model(TOKENS), expected)
    assert torch.equal(model.state_dict()["scale"], make().scale)
    stop(model)


def test_removing_gives_back_an_ordinary_model() -> None:
    model = make().eval()
    expected = resident()
    offload(model)
    assert has_offloaded_params(model.embed)
    assert has_offloaded_params(model)  # `scale`
    assert not has_offloaded_params(model.blocks[0])
    assert has_offloaded_params(model.blocks[0].norm)
    assert remove_hooks(model) is model
    assert not has_offloaded_params(model.embed)
    assert model.head.weight is model.embed.weight
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
    out = model(TOKENS)
    assert torch.equal(out, expected)
    out.sum().backward()
    pickle.loads(pickle.dumps(model))
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    offload(model)
    with pytest.raises(ConfigError, match="offloaded already"):
        cpu_offload(model, "cpu")


def test_modules_inside_of_a_block_can_be_called_by_themselves() -> None:
    """As by activation checkpointing that computes a block's forward again without calling the block."""
    model = make().eval()
    transfers = offload(model)
    rows = torch.ones(2, 8)
    with transfers.watch(), torch.no_grad():
        assert torch.equal(model.blocks[1].mlp(rows), make().eval().blocks[1].mlp(rows))
        assert torch.equal(model.blocks[1].norm(rows), make().eval().blocks[1].norm(rows))
        model.blocks[3].norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.blocks[3].norm(rows)
    assert all(isinstance(parameter, Placeholder) for parameter in model.parameters())
    assert not any(unit.is_entered for unit in units_of(model))


def test_a_block_that_is_compiled_gives_the_same() -> None:
    """Bringing weights ends a graph before each unit and behind it, and nowhere else."""
    model = make().eval()
    with torch.no_grad():
        expected = resident()
    transfers = offload(model)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(TOKENS), expected)
        frames = counter.frame_count
        for _ in range(3):
            compiled(TOKENS)
    assert counter.frame_count == frames
    assert transfers.num_copies > 0
    torch._dynamo.reset()
