"""Ranks that load one checkpoint together: each byte is read by one of them, and errors reach all."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading import LoadedCheckpoint, ReadSettings, load_checkpoint_in_model
from accel_bigmodel.loading import delivery as delivery_module
from accel_bigmodel.testing import save_file
from accel_state import Process
from accel_state.errors import AccelError
from accel_state.testing import run_ranks

READING = ReadSettings(chunk_bytes=4096)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{number}.{name}": torch.randn(*shape, generator=generator)
        for number in range(4)
        for name, shape in (("weight", (50, 50)), ("bias", (50,)))
    }


def empty() -> Any:
    with init_empty_weights():
        return nn.Sequential(*(nn.Linear(50, 50) for _ in range(4)))


def rank() -> int:
    return Process.current().topology.rank


def load(model: nn.Module, path: str, **arguments: Any) -> LoadedCheckpoint:
    return load_checkpoint_in_model(model, path, broadcast_from_rank0=True, reading=READING, **arguments)


def load_all(path: str, dtypes: list[str | None]) -> tuple[bool, int, list[tuple[int, int]]]:
    """Whether values are right, bytes read as told, and the ranges of the file that this rank really read."""
    ranges: list[tuple[int, int]] = []
    original = delivery_module.read_bytes

    def counted(descriptor: int, stored: Any, destination: torch.Tensor, *, begin: int = 0) -> None:
        ranges.append((stored.offset + begin, stored.offset + begin + destination.numel()))
        original(descriptor, stored, destination, begin=begin)

    model = empty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery_module, "read_bytes", counted)
        result = load(model, path, dtype=dtypes[rank()])
    expected = tensors()
    right = all(torch.equal(each, expected[name].to(each.dtype)) for name, each in model.state_dict().items())
    return right, result.bytes_read, ranges


@pytest.mark.parametrize("dtypes", [[None, None, None], ["bf16", None, "float64"]])
@pytest.mark.parametrize("world_size", [2, 3])
def test_each_byte_is_read_once_and_all_ranks_have_everything(
    tmp_path: Path, dtypes: list[str | None], world_size: int
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    results = run_ranks(load_all, world_size, str(path), dtypes)
    assert all(right for right, _, _ in results)
    size = sum(each.nbytes for each in tensors().values())
    ranges = sorted(each for _, _, ranges in results for each in ranges)
    assert sum(end - begin for begin, end in ranges) == size
    assert all(one[1] <= other[0] for one, other in pairwise(ranges)), "bytes were read twice"
    assert sum(told for _, told, _ in results) == size
    assert all(told > 0 for _, told, _ in results), "a rank of the node of rank 0 did not take part in reading"


def load_from_rank0(path: str) -> tuple[bool, int]:
    own = path if rank() == 0 else f"{path}.not-here"
    model = empty()
    result = load(model, own)
    return all(torch.equal(each, tensors()[name]) for name, each in model.state_dict().items()), result.bytes_read


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_ranks_that_see_no_file_only_receive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    save_file(tensors(), path) if suffix == "safetensors" else torch.save(tensors(), path)
    first, second = run_ranks(load_from_rank0, 2, str(path))
    assert first == (True, sum(each.nbytes for each in tensors().values()))
    assert second == (True, 0)


def load_copies(folder: str) -> tuple[float, int]:
    model = empty()
    result = load(model, f"{folder}/{rank()}.safetensors")
    return model[0].bias[0].item(), result.bytes_read


def test_a_rank_with_another_file_of_the_same_form_does_not_mix_it_in(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "0.safetensors")
    save_file({name: each + 1 for name, each in tensors().items()}, tmp_path / "1.safetensors")
    first, second = run_ranks(load_copies, 2, str(tmp_path))
    assert first[0] == second[0] == tensors()["0.bias"][0].item()
    assert second[1] == 0


def fail(path: str, case: str) -> str:
    """The error that this rank raises, in which others have nothing wrong."""
    arguments: dict[str, Any] = {}
    model = empty()
    if case == "missing" and rank() == 0:
        path += ".not-here"
    if case == "map" and rank() == 1:
        arguments["device_map"] = {"0": "cpu"}
    if case == "disk":
        arguments["device_map"] = {"": "disk"}
    if case == "mmap":
        arguments["mmap"] = True
    if case == "shape" and rank() == 1:
        model[1] = nn.Linear(50, 49)
    if case == "cut" and rank() == 1:
        original = delivery_module.read_bytes

        def broken(descriptor: int, stored: Any, destination: torch.Tensor, *, begin: int = 0) -> None:
            if stored.name == "2.weight":
                raise OSError(5, "Input/output error")
            original(descriptor, stored, destination, begin=begin)

        delivery_module.read_bytes = broken
    try:
        load(model, path, **arguments)
    except (AccelError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("case", "of_first", "of_second"),
    [
        ("missing", "CheckpointError: There is no file", "Rank 0 could not load its part, .*There is no file"),
        ("map", "Rank 1 could not load its part, so no rank has", "ConfigError: `device_map` says nothing of 6"),
        ("disk", "ConfigError: `device_map` keeps 8 tensors on disk", "ConfigError: `device_map` keeps 8 tensors"),
        ("mmap", "ConfigError: `mmap=True` has each rank map", "ConfigError: `mmap=True` has each rank map"),
        ("shape", "Rank 1 could not load.*another shape", r"CheckpointError: .*\[49, 50\] in the model"),
        ("cut", "Rank 1 could not load its part.*Input/output error", r"OSError: \[Errno 5\]"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, case: str, of_first: str, of_second: str) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    first, second = run_ranks(fail, 2, str(tmp_path / "x.safetensors"), case, timeout_s=30)
    assert re.search(of_first, first)
    assert re.search(of_second, second)


def load_in_one(path: str) -> bool:
    model = empty()
    result = load(model, path)
    right = all(torch.equal(each, tensors()[name]) for name, each in model.state_dict().items())
    return right and result.bytes_read > 0


def test_a_world_of_one_and_no_world_load_alone(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    assert load_in_one(str(tmp_path / "x.safetensors"))
    assert run_ranks(load_in_one, 1, str(tmp_path / "x.safetensors")) == [True]


def load_sharded(path: str, broadcast: bool) -> tuple[bool, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = empty()
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model[3].register_parameter("weight", nn.Parameter(distribute_tensor(torch.empty(50, 50), mesh, [Shard(1)])))
    model[3].register_parameter("bias", nn.Parameter(distribute_tensor(torch.empty(50), mesh, [Replicate()])))
    result = load_checkpoint_in_model(model, path, broadcast_from_rank0=broadcast, reading=READING)
    state = model.state_dict()
    assert all(isinstance(each, DTensor) for each in state.values())
    right = all(torch.equal(each.full_tensor(), tensors()[name]) for name, each in state.items())
    return right, result.bytes_read


@pytest.mark.parametrize("broadcast", [False, True])
def test_sharded_parameters_take_their_part(tmp_path: Path, broadcast: bool) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    results = run_ranks(load_sharded, 2, str(tmp_path / "x.safetensors"), broadcast)
    size = sum(each.nbytes for each in tensors().values())
    assert all(right for right, _ in results)
    read = sum(each for _, each in results)
    if broadcast:
        assert read == size
    else:  # the columns of one tensor and all of another are read by both
        assert read == size + (50 * 50 + 50) * 4
