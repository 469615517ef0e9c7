"""What `accel checkpoint convert` makes of other libraries' folders, and that it never runs a pickle."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from accel_parallel.checkpoint import Checkpoint
from accel_parallel.checkpoint_commands import main
from accel_parallel.checkpoint_commands.convert.opcodes import Record, read_pickle
from accel_state.errors import CheckpointError, ConfigError
from accel_state.testing import run_ranks

Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Convert; what was printed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main(["convert", *(str(word) for word in words)]) == 0
        return capsys.readouterr().out

    return run


def network(*, alike: bool = False) -> nn.Module:
    torch.manual_seed(0)
    width = 4 if alike else 5
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4 if alike else 2))


def trained(model: nn.Module, make: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    optimizer = make(model.parameters(), lr=0.01, **options)
    for _ in range(3):
        model(torch.randn(6, 4)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def generators(step: int = 3) -> dict[str, Any]:
    """As accelerate keeps them."""
    return {
        "step": step,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }


def write_accelerate(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, safe: bool = False, ranks: int = 1
) -> Path:
    """The layout of accelerate's `save_state`, written as that does."""
    folder.mkdir()
    if safe:
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save(torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5]).state_dict(), folder / "scheduler.bin")
    for rank in range(ranks):
        torch.save(generators(), folder / f"random_states_{rank}.pkl")
    return folder


def check(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """That a checkpoint holds these, by name."""
    checkpoint = Checkpoint(output)
    state = model.state_dict()
    found = checkpoint.read("model")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    names = {parameter: f"model.{name}" for name, parameter in model.named_parameters()}
    content = checkpoint.read("optimizer")
    assert content["state"].keys() == {names[parameter] for parameter in optimizer.state}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(content["state"][names[parameter]][key]), torch.as_tensor(value))
    for saved, group in zip(content["groups"], optimizer.param_groups, strict=True):
        assert saved["params"] == [names[parameter] for parameter in group["params"]]
        assert saved["param_shapes"] == [list(parameter.shape) for parameter in group["params"]]
        assert saved["param_dtypes"] == [parameter.dtype for parameter in group["params"]]
        assert saved["lr"] == group["lr"]


# accelerate


def test_a_folder_of_accelerate_is_read_whole(tmp_path: Path, say: Say) -> None:
    model = network()
    optimizer = trained(model, torch.optim.AdamW)
    source = write_accelerate(tmp_path / "old", model, optimizer, ranks=2)
    torch.save({"scale": 2.0, "_growth_tracker": 3}, source / "scaler.pt")
    for number in (0, 1, 10):
        torch.save({"number": number, "tensor": torch.ones(2)}, source / f"custom_checkpoint_{number}.pkl")
    torch.save({"place": 3}, source / "dl_state_dict.bin")
    random.seed(7)
    torch.save(generators(), source / "random_states_1.pkl")
    out = say(source, tmp_path / "new")
    check(tmp_path / "new", model, optimizer)
    checkpoint = Checkpoint(tmp_path / "new")
    assert (checkpoint.manifest.step, checkpoint.manifest.world_size) == (3, 2)
    assert checkpoint.manifest.strategy == "converted from accelerate"
    assert checkpoint.read("scheduler")["milestones"] == {2: 2, 5: 1}
    assert checkpoint.read("scaler") == {"scale": 2.0, "_growth_tracker": 3}
    assert [checkpoint.read(name)["number"] for name in ("custom", "custom_1", "custom_10")] == [0, 1, 10]
    version, words, gauss = random.getstate()
    assert checkpoint.read("rng_1")["python"] == [version, list(words), gauss]
    assert checkpoint.read("rng_0")["numpy"]["state"]["key"] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert "left out: dl_state_dict.bin: places in the data are kept in another way here." in out
    assert "named in the order of the model's file, which all shapes agree with" in out


def test_sorted_weights_need_names_where_shapes_are_alike(tmp_path: Path, say: Say) -> None:
    model = network(alike=True)
    optimizer = trained(model, torch.optim.Adam)
    source = write_accelerate(tmp_path / "old", model, optimizer, safe=True)
    with pytest.raises(CheckpointError, match=r"numbers its 6 parameters .* names none.*Give `--parameter-names"):
        say(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    names = tmp_path / "names.json"
    names.write_text(json.dumps([name for name, _ in model.named_parameters()]))
    assert "note" not in say(source, tmp_path / "new", "--parameter-names", names)
    check(tmp_path / "new", model, optimizer)


def test_sorted_weights_are_named_by_shapes_that_differ(tmp_path: Path, say: Say) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = trained(model, torch.optim.SGD, momentum=0.9)
    source = write_accelerate(tmp_path / "old", model, optimizer, safe=True)
    assert "by their shapes" in say(source, tmp_path / "new", "--step", "3")
    check(tmp_path / "new", model, optimizer)
    assert Checkpoint(tmp_path / "new").read("optimizer")["steps_taken"] == 3


def test_two_groups_are_not_in_the_order_of_the_model(tmp_path: Path, say: Say) -> None:
    model = network(alike=True)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.01)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    source = write_accelerate(tmp_path / "old", model, optimizer)
    with pytest.raises(CheckpointError, match=r"in 2 groups and names none"):
        say(source, tmp_path / "new")
    named = {parameter: name for name, parameter in model.named_parameters()}
    names = tmp_path / "names.json"
    names.write_text(json.dumps([named[parameter] for parameter in [*decayed, *others]]))
    say(source, tmp_path / "new", "--parameter-names", names)
    check(tmp_path / "new", model, optimizer)


@pytest.mark.parametrize("why", ["sorted", "two groups"])
def test_an_order_that_shapes_agree_with_by_chance_is_not_taken(why: str, tmp_path: Path, say: Say) -> None:
    model = nn.Sequential(OrderedDict(b=nn.Linear(4, 4, bias=False), a=nn.Linear(4, 4, bias=False)))
    optimizer = trained(model, torch.optim.Adam)
    if why == "two groups":
        groups = [{"params": [model.a.weight]}, {"params": [model.b.weight]}]
        optimizer = torch.optim.Adam(groups)  # type: ignore[arg-type]
        model(torch.randn(6, 4)).sum().backward()
        optimizer.step()
    source = write_accelerate(tmp_path / "old", model, optimizer, safe=why == "sorted")
    with pytest.raises(CheckpointError, match=r"numbers its 2 parameters in . groups? and names none"):
        say(source, tmp_path / "new")


def test_names_that_do_not_fit_are_refused(tmp_path: Path, say: Say) -> None:
    model = network()
    source = write_accelerate(tmp_path / "old", model, trained(model, torch.optim.Adam))
    right = [name for name, _ in model.named_parameters()]
    names = tmp_path / "names.json"
    for wrong, message in (
        (right[:-1], r"holds 5 names, and `optimizer.bin` 6 parameters"),
        ([*right[:-1], "2.bia"], r"`2.bia` of `optimizer.bin` is no tensor of the model. Did you mean '2.bias'\?"),
        ([*right[:-1], right[0]], r"Two parameters of `optimizer.bin` have one name"),
        (right[::-1], r"Parameter 0 .* has state of shape \(5, 4\), and `model.2.bias` has shape \(2,\)"),
    ):
        names.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=message):
            say(source, tmp_path / "new", "--parameter-names", names)
    for text, message in (("{", r"is no JSON"), ('{"a": 1}', r"is no list of names")):
        names.write_text(text)
        with pytest.raises(ConfigError, match=message):
            say(source, tmp_path / "new", "--parameter-names", names)


def test_names_that_the_optimizer_was_given_are_taken(tmp_path: Path, say: Say) -> None:
    model = network(alike=True)
    optimizer = trained(model, torch.optim.Adam)
    source = write_accelerate(tmp_path / "old", model, optimizer, safe=True)
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = [name for name, _ in model.named_parameters()]
    torch.save(state, source / "optimizer.bin")
    say(source, tmp_path / "new")
    check(tmp_path / "new", model, optimizer)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_weights_in_several_files_and_two_models(layout: str, tmp_path: Path, say: Say) -> None:
    source = tmp_path / "old"
    source.mkdir()
    state = network().state_dict()
    where = {}
    for number, (name, _tensor) in enumerate(state.items()):
        where[name] = f"part-{number % 2}.{layout}"
    for file in set(where.values()):
        part = {name: state[name] for name in state if where[name] == file}
        save_file(part, source / file) if layout == "safetensors" else torch.save(part, source / file)
    stem = "model.safetensors" if layout == "safetensors" else "pytorch_model.bin"
    (source / f"{stem}.index.json").write_text(json.dumps({"weight_map": where}))
    second = {"_orig_mod.w": torch.ones(2), "_orig_mod.v": torch.zeros(3)}
    torch.save(second, source / "pytorch_model_1.bin")
    out = say(source, tmp_path / "new", "--step", "4")
    found = Checkpoint(tmp_path / "new")
    assert found.manifest.step == 4
    assert all(torch.equal(found.read("model")[name], tensor) for name, tensor in state.items())
    assert sorted(found.read("model_1")) == ["v", "w"]
    assert "`_orig_mod.`, which `torch.compile` puts in front of names, was removed" in out


def test_tied_weights_are_tied_again(tmp_path: Path, say: Say) -> None:
    source = tmp_path / "old"
    source.mkdir()
    save_file({"embed.weight": torch.ones(3, 2)}, source / "model.safetensors")
    say(source, tmp_path / "new", "--tie", "head.weight=embed.weight")
    assert Checkpoint(tmp_path / "new").items["model"].aliases == {"head.weight": "embed.weight"}
    with pytest.raises(CheckpointError, match=r"`--tie a=b`: `model.safetensors` lacks `b`. Give the missing"):
        say(source, tmp_path / "new", "--tie", "a=b", "--force")
    shared = torch.ones(3, 2)
    torch.save({"embed.weight": shared, "head.weight": shared}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds one model twice, in model.safetensors and pytorch_model.bin"):
        say(source, tmp_path / "new", "--force")
    (source / "model.safetensors").unlink()
    say(source, tmp_path / "new", "--force")
    assert Checkpoint(tmp_path / "new").items["model"].aliases == {"head.weight": "embed.weight"}


class Touch:
    """A pickle of this makes a file where it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.bin"])
def test_a_pickle_that_runs_something_is_refused(name: str, tmp_path: Path, say: Say) -> None:
    model = network()
    source = write_accelerate(tmp_path / "old", model, trained(model, torch.optim.Adam))
    torch.save({"weight": Touch(tmp_path / "ran")}, source / name)
    with pytest.raises(CheckpointError, match=rf"{name}` holds `posix.mkdir` and not only .* never run in full"):
        say(source, tmp_path / "new")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()


def test_smaller_parts_that_run_something_are_left_out_by_name(tmp_path: Path, say: Say) -> None:
    model = network()
    source = write_accelerate(tmp_path / "old", model, trained(model, torch.optim.Adam))
    for name in ("scheduler.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"):
        torch.save({"x": Touch(tmp_path / "ran")}, source / name)
    odd = {
        **generators(),
        "numpy_random_seed": ("MT19937", np.array([Touch(tmp_path / "ran")], dtype=object), 1, 0, 0.0),
    }
    torch.save(odd, source / "random_states_1.pkl")
    out = say(source, tmp_path / "new")
    for name in ("scheduler.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl", "random_states_1.pkl"):
        assert f"left out: {name}: " in out
    assert list(Checkpoint(tmp_path / "new").items) == ["model", "optimizer"]
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_converted_is_refused(tmp_path: Path, say: Say) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        CheckpointError, match=r"holds no weights that `save_state` of accelerate writes.*Name the folder"
    ):
        say(empty, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"`.*/nowhere` is no folder, so there is nothing to convert"):
        say(tmp_path / "nowhere", tmp_path / "new")
    (empty / "pytorch_model").mkdir()
    with pytest.raises(CheckpointError, match=r"DeepSpeed's own files are in it"):
        say(empty, tmp_path / "new")
    torch.save({"weight": torch.ones(2)}, empty / "pytorch_model.bin")
    say(empty, tmp_path / "new")
    with pytest.raises(ConfigError, match=r"`.*/new` holds a checkpoint, which would be replaced"):
        say(empty, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"is a checkpoint of ours already. Give it to `load_state`"):
        say(tmp_path / "new", tmp_path / "newer")
    with pytest.raises(ConfigError, match=r"`--model-key` is for folders of torch.distributed.checkpoint"):
        say(empty, tmp_path / "newer", "--model-key", "net")
    with pytest.raises(ConfigError, match=r"is what is to be read. Name another folder"):
        say(empty, empty)
    names = tmp_path / "names.json"
    names.write_text("[]")
    with pytest.raises(CheckpointError, match=r"`--parameter-names` is for the one optimizer .* this one has 0"):
        say(empty, tmp_path / "newer", "--parameter-names", names)
    (empty / "pytorch_model.bin").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin` cannot be read as .*: it is damaged, or no file"):
        say(empty, tmp_path / "newer")


# torch.distributed.checkpoint


def save_divided(folder: str) -> None:
    """On every rank: a model and an optimizer divided over two processes, as torch saves them."""
    model, whole = network(alike=True), network(alike=True)
    optimizer = trained(whole, torch.optim.AdamW)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    mine = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    for _ in range(3):
        model(torch.randn(6, 4)).pow(2).mean().backward()
        mine.step()
        mine.zero_grad()
    del optimizer
    state, optimizer_state = get_state_dict(model, mine)
    scheduler = torch.optim.lr_scheduler.StepLR(mine, 2).state_dict()
    dcp.save({"model": state, "optimizer": optimizer_state, "scheduler": scheduler, "epoch": 4}, checkpoint_id=folder)
    dcp.save(state, checkpoint_id=f"{folder}-flat")
    full = {name: getattr(tensor, "full_tensor", lambda value=tensor: value)() for name, tensor in state.items()}
    moments = {
        f"{name}.{key}": value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, entries in optimizer_state["state"].items()
        for key, value in entries.items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save((full, moments), f"{folder}.pt")


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "step-3"
    run_ranks(save_divided, 2, str(folder))
    return folder


def test_divided_tensors_are_put_together(divided: Path, tmp_path: Path, say: Say) -> None:
    out = say(divided, tmp_path / "new")
    full, moments = torch.load(f"{divided}.pt")
    checkpoint = Checkpoint(tmp_path / "new")
    assert (checkpoint.manifest.step, checkpoint.manifest.world_size) == (3, 2)
    found = checkpoint.read("model")
    assert found.keys() == full.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in full.items())
    content = checkpoint.read("optimizer")
    held = {
        f"{name}.{key}".removeprefix("model."): value
        for name, entries in content["state"].items()
        for key, value in entries.items()
    }
    assert held.keys() == moments.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in moments.items())
    (group,) = content["groups"]
    assert group["params"] == [f"model.{name}" for name, _ in network(alike=True).named_parameters()]
    assert group["lr"] == 0.01
    assert tuple(group["betas"]) == (0.9, 0.999)
    assert checkpoint.read("scheduler")["step_size"] == 2
    assert "left out: epoch: it is neither model nor optimizer nor scheduler" in out


def test_tensors_under_no_key_are_the_model(divided: Path, tmp_path: Path, say: Say) -> None:
    say(f"{divided}-flat", tmp_path / "new", "--step", "3")
    full, _ = torch.load(f"{divided}.pt")
    found = Checkpoint(tmp_path / "new").read("model")
    assert all(torch.equal(found[name], tensor) for name, tensor in full.items())


def save_alone(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_a_state_keyed_by_position_and_other_keys(tmp_path: Path, say: Say) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = trained(model, torch.optim.Adam)
    state = {"net": model.state_dict(), "opt": optimizer.state_dict(), "config": {"a": 1}}
    source = save_alone(tmp_path / "old", state)
    with pytest.raises(CheckpointError, match=r"no tensors under `model`; it holds config, net, opt. Say"):
        say(source, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"holds nothing under `nets`; it holds config, net, opt"):
        say(source, tmp_path / "new", "--model-key", "nets")
    out = say(source, tmp_path / "new", "--model-key", "net", "--optimizer-key", "opt")
    check(tmp_path / "new", model, optimizer)
    assert "by their shapes" in out
    assert "left out: config" in out


def test_parts_in_folders_of_accelerate(tmp_path: Path, say: Say) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = trained(model, torch.optim.Adam)
    source = tmp_path / "old"
    save_alone(source / "pytorch_model_fsdp_0", {"model": model.state_dict()})
    state = get_state_dict(model, optimizer)[1]
    save_alone(source / "optimizer_0", {"optimizer": state})
    say(source, tmp_path / "new")
    check(tmp_path / "new", model, optimizer)


def test_a_description_that_runs_something_is_never_run(tmp_path: Path, say: Say) -> None:
    source = save_alone(tmp_path / "old", {"model": {"weight": torch.ones(3)}, "other": {"x": torch.ones(1)}})
    (source / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"does not describe a checkpoint as torch.distributed.checkpoint does"):
        say(source, tmp_path / "new")
    assert not (tmp_path / "ran").exists()


def test_damage_is_named(tmp_path: Path, say: Say) -> None:
    source = save_alone(tmp_path / "old", {"model": {"weight": torch.ones(3)}})
    (file,) = source.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match=r"`model.weight` in .* is damaged: .* is shorter than .metadata says"):
        say(source, tmp_path / "new")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"`model.weight` in .* is damaged: .* could not be read"):
        say(source, tmp_path / "new")
    (source / ".metadata").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r".metadata` is no pickle of plain records .* which is never done"):
        say(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_files_outside_the_folder_are_not_read(tmp_path: Path, say: Say) -> None:
    source = save_alone(tmp_path / "old", {"model": {"weight": torch.ones(3)}})
    (file,) = source.glob("*.distcp")
    description = (source / ".metadata").read_bytes()
    outside = "/" + "x" * (len(file.name) - 1)
    (source / ".metadata").write_bytes(description.replace(file.name.encode(), outside.encode()))
    with pytest.raises(CheckpointError, match=r"which lies outside of it. Such a checkpoint is not read"):
        say(source, tmp_path / "new")


# Pickles as data

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers())
        | st.sets(st.text())
    ),
    max_leaves=30,
)


@given(value=plain, protocol=st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_plain_values_are_what_pickle_reads(value: Any, protocol: int) -> None:
    # Sets of old protocols and long integers are calls of functions there.
    try:
        found = read_pickle(pickle.dumps(value, protocol), "file")
    except CheckpointError:
        assert protocol < 4
        return
    assert "Record" in _types(found) or found == value


def _types(value: Any) -> set[str]:
    found = {type(value).__name__}
    for inner in list(value.items()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        found |= _types(inner)
    return found


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_calls_are_noted_and_not_made(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps([Touch(tmp_path / "ran"), OrderedDict(a=1), torch.Size([2, 3]), torch.float16], protocol)
    call, mapping, size, dtype = read_pickle(content, "file")
    assert isinstance(call, Record)
    assert call.name.endswith(".mkdir")
    assert call.args == (str(tmp_path / "ran"),)
    assert mapping == {"a": 1}
    assert (size.name, size.args) == ("torch.Size", ((2, 3),))
    assert dtype.name == "torch.float16"
    assert not (tmp_path / "ran").exists()


@given(content=st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with suppress(CheckpointError):  # and nothing else may be raised
        read_pickle(content + b".", "file")


def test_every_cut_of_a_description_is_refused(tmp_path: Path) -> None:
    source = save_alone(tmp_path / "old", {"model": {"weight": torch.ones(3)}})
    content = (source / ".metadata").read_bytes()
    assert isinstance(read_pickle(content, "file"), Record)
    for length in range(0, len(content), 7):
        with pytest.raises(CheckpointError, match=r"`file` is no pickle of plain records"):
            read_pickle(content[:length], "file")
