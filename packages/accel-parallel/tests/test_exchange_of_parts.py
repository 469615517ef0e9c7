"""Divided tensors come together bit by bit on the ranks that write them, in files that any reader understands."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from accel_parallel.checkpoint import BackgroundSaver, Checkpoint, Item, save_checkpoint
from accel_parallel.checkpoint import exchange as exchange_module
from accel_parallel.checkpoint import outgoing as outgoing_module
from accel_parallel.checkpoint.exchange import Exchange
from accel_parallel.checkpoint.plan import plan_files
from accel_parallel.flat import FlatPart
from accel_parallel.sharded import local_of
from accel_state import CheckpointError, Process
from accel_state.testing import run_ranks

R, S0, S1 = Replicate(), Shard(0), Shard(1)
WHOLE: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "uneven": ((7, 5), torch.float32),
    "fewer_rows_than_ranks": ((1, 6), torch.float64),
    "one_dim": ((11,), torch.bfloat16),
    "three_dims": ((3, 5, 2), torch.float16),
    "eighths": ((5, 8), torch.float8_e4m3fn),
    "flags": ((9, 3), torch.bool),
    "numbers": ((4, 6), torch.int64),
    "complex": ((4, 3), torch.complex64),
    "none": ((0, 4), torch.float32),
}
"""Shapes and dtypes; a value for any of them is made of random bytes, so that every pattern of bits occurs."""
PLACEMENTS: dict[int, list[tuple[Any, ...]]] = {
    1: [(R,), (S0,), (S1,)],
    2: [(R, R), (R, S0), (S0, R), (S0, S1), (S1, S0), (S0, S0), (R, S1)],
}
CUTS: dict[int, list[tuple[int, ...]]] = {
    2: [(0, 0, 1), (0, 1, 1), (0, 3, 10)],
    3: [(0, 0, 1, 1), (0, 3, 3, 10)],
    4: [(0, 0, 0, 1, 1), (0, 3, 3, 9, 10)],
}
"""Where ranges of flattened tensors begin and end on each rank, in tenths."""


def value(name: str) -> torch.Tensor:
    """The same on every rank."""
    shape, dtype = WHOLE[name]
    generator = torch.Generator().manual_seed(sorted(WHOLE).index(name))
    size = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    raw = torch.randint(256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def divided(whole: torch.Tensor, mesh: Any, placements: tuple[Any, ...]) -> torch.Tensor:
    """As torch divides it. Its communication knows no bytes of some dtypes, so integers of the same size go."""
    if not whole.numel():
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)
    numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.dtype.itemsize]
    made = distribute_tensor(whole.view(numbers), mesh, placements, src_data_rank=None)
    return DTensor.from_local(
        made.to_local().view(whole.dtype), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def state_of(dims: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Every value in every way to divide it, and what each is."""
    world, rank = Process.current().topology.world_size, Process.current().topology.rank
    mesh = init_device_mesh("cpu", (world,) if dims == 1 else (2, world // 2))
    state: dict[str, Any] = {}
    expected: dict[str, torch.Tensor] = {}
    for name in WHOLE:
        for placements in PLACEMENTS[dims]:
            way = "".join("R" if each.is_replicate() else str(each.dim) for each in placements)
            if "1" in way and len(WHOLE[name][0]) < 2:
                continue
            state[f"{name}_{way}"], expected[f"{name}_{way}"] = divided(value(name), mesh, placements), value(name)
        for number, cuts in enumerate(CUTS[world]):
            flat = value(name).reshape(-1)
            ends = [cut * flat.numel() // cuts[-1] for cut in cuts]
            part = FlatPart(value(name).shape, ends[rank], flat[ends[rank] : ends[rank + 1]].clone(), None)
            state[f"{name}_range{number}"], expected[f"{name}_range{number}"] = part, value(name)
    scalar = torch.tensor(0.1, dtype=torch.float64)
    everywhere = (R,) * dims
    state["scalar"] = DTensor.from_local(scalar, mesh, everywhere, run_check=False)
    expected["scalar"] = scalar
    # Whole tensors differ by rank, such as running means: the main process's are saved.
    state["whole"], expected["whole"] = torch.tensor([rank, 5]), torch.tensor([0, 5])
    return state, expected


def small(stack: ExitStack, *, exchange: int = 100, smallest: int = 200, largest: int = 600) -> None:
    """Sizes at which the little of these tests makes many exchanges and files."""
    stack.enter_context(patch.object(exchange_module, "EXCHANGE_BYTES", exchange))
    plan = partial(plan_files, smallest=smallest, largest=largest)
    stack.enter_context(patch.object(outgoing_module, "plan_files", plan))


def put_together(dims: int, exchange_bytes: int) -> tuple[list[str], int]:
    """On a rank: what came wrong of all that this rank was to get, and how many exchanges there were."""
    process = Process.current()
    rank, world = process.topology.rank, process.topology.world_size
    state, expected = state_of(dims)
    wrong = []
    calls = 0
    received = Exchange._received

    def counted(self: Exchange, wanted: Any) -> Any:
        nonlocal calls
        calls += 1
        return received(self, wanted)

    names = sorted(state)
    writers = [number % world for number in range(len(names))]
    with patch.object(exchange_module, "EXCHANGE_BYTES", exchange_bytes), patch.object(Exchange, "_received", counted):
        got = list(Exchange(state, process=process).whole(names, writers))
    assert [name for name, _ in got] == names
    for (name, found), writer in zip(got, writers, strict=True):
        if writer != rank:
            wrong += [name] if found is not None else []
            continue
        wanted = expected[name] if name != "whole" else local_of(state[name])
        assert found is not None
        assert not found.requires_grad
        if (found.shape, found.dtype, bits(found)) != (wanted.shape, wanted.dtype, bits(wanted)):
            wrong.append(name)
    return wrong, calls


@pytest.mark.parametrize(("world", "dims"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("exchange_bytes", [1, 100, 1 << 20])
def test_parts_come_together_bit_by_bit(world: int, dims: int, exchange_bytes: int) -> None:
    for wrong, calls in run_ranks(put_together, world, dims, exchange_bytes):
        assert wrong == []
        assert calls == 1 if exchange_bytes == 1 << 20 else calls > 10


def saved(folder: str, dims: int, spread: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """On a rank: files of a save that blocks and of one that does not, and the bits that should be in them."""
    process = Process.current()
    state, expected = state_of(dims)
    state["tied"] = state["uneven_" + "0" * dims]
    items = [Item("model", "model", state, shared=True)]
    with ExitStack() as stack:
        small(stack)
        save_checkpoint(Path(folder, "run"), items, process=process, step=1, strategy="any", spread=spread)
        saver = BackgroundSaver(process)
        saver.save(Path(folder, "background"), items, step=1, strategy="any", spread=spread).wait()
        saver.close()
    return {name: bits(tensor) for name, tensor in expected.items()}, contents(Path(folder, "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_by_the_library(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no dict


@pytest.mark.parametrize(("world", "dims", "spread"), [(2, 1, True), (3, 1, True), (4, 2, True), (2, 1, False)])
def test_files_are_those_of_whole_tensors_whatever_divided_them(
    tmp_path: Path, world: int, dims: int, spread: bool
) -> None:
    expected, files = run_ranks(saved, world, str(tmp_path), dims, spread)[0]
    assert files == contents(tmp_path / "background")
    parts = sorted((tmp_path / "run").glob("model-*.safetensors"))
    assert len(parts) > 3
    index = json.loads(files["model.safetensors.index.json"])
    found: dict[str, bytes] = {}
    for path in parts:
        for name, tensor in read_by_the_library(path).items():
            assert name not in found
            assert index["weight_map"].pop(name) == path.name
            found[name] = bits(tensor)
    assert index == {"metadata": {"total_size": sum(map(len, found.values()))}, "weight_map": {}}
    assert found == expected
    checkpoint = Checkpoint(tmp_path / "run")
    checkpoint.verify()
    assert set(files) == {"manifest.json", *checkpoint.items["model"].files}
    back = checkpoint.read("model")
    assert back.pop("tied") is back["uneven_" + "0" * dims]
    assert {name: bits(tensor) for name, tensor in back.items()} == expected


def writers_of(folder: str) -> list[str]:
    """On a rank: which of the files it writes itself."""
    process = Process.current()
    mesh = init_device_mesh("cpu", (process.topology.world_size,))
    whole = torch.arange(24.0).view(6, 4)
    state = {f"w{number}": distribute_tensor(whole + number, mesh, [S0]) for number in range(12)}
    with ExitStack() as stack:
        small(stack, smallest=96, largest=10_000)
        shared = outgoing_module.Outgoing([Item("model", "model", state, shared=True)]).share(process)
        return [file.name for file in shared.files]


def test_every_rank_writes_its_share(tmp_path: Path) -> None:
    index, *rest = run_ranks(writers_of, 3, str(tmp_path))
    assert index == ["model.safetensors.index.json", "model-00001-of-00003.safetensors"]
    assert rest == [["model-00002-of-00003.safetensors"], ["model-00003-of-00003.safetensors"]]


def incomplete(kind: str) -> str:
    process = Process.current()
    rank = process.topology.rank
    if kind == "missing":  # nobody has the last two
        part: Any = FlatPart(torch.Size((10,)), 4 * rank, torch.ones(4), None)
    else:  # half of it twice, and the other half by nobody
        part = FlatPart(torch.Size((10,)), 0, torch.ones(5), None)
    with pytest.raises(CheckpointError, match="of `part` together, so it cannot be saved") as caught:
        Exchange({"part": part}, process=process)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "held"), [("missing", 8), ("twice", 5)])
def test_parts_that_are_missing_are_noticed_on_every_rank(kind: str, held: int) -> None:
    for message in run_ranks(incomplete, 2, kind):
        assert f"The ranks hold {held} of the 10 elements of `part` together" in message


def copies() -> list[int]:
    """On a rank of four, of which each two hold the same: the numbers of parts that each sends."""
    process = Process.current()
    rank = process.topology.rank
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "other"))["rows"]
    part = FlatPart(torch.Size((2, 3)), 4 * (rank % 2), torch.arange(6.0)[4 * (rank % 2) :][:4].clone(), None)
    state: dict[str, Any] = {"rows": distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [S0]), "range": part}
    exchange = Exchange(state, process=process)
    for name, whole in exchange.whole(["rows", "range"], [3, 3]):
        assert (whole is None) == (rank != 3)
        assert whole is None or torch.equal(whole.reshape(-1), torch.arange(float(whole.numel()))), name
    return [len(exchange._parts(name)) for name in state]


def test_what_several_ranks_hold_is_sent_by_one() -> None:
    # Rows 0 and 1 lie on ranks 0 and 1; the range's boxes are a row and a part of one, and a part of one.
    assert run_ranks(copies, 4) == [[1, 2], [0, 1], [1, 0], [0, 0]]


def tied(folder: str) -> tuple[list[str], Any]:
    """Where the main process holds nothing of two tensors, only others can see that they are one, or not one."""
    process = Process.current()
    rank = process.topology.rank
    mesh = init_device_mesh("cpu", (process.topology.world_size,))
    own = FlatPart(torch.Size((4,)), 0, torch.arange(4.0) if rank == 1 else torch.empty(0), None)
    one = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [S0])
    state = {"b": own, "a": own, "y": one, "x": one, "z": one.detach().clone()}
    save_checkpoint(
        Path(folder, "run"), [Item("model", "model", state, shared=True)], process=process, step=0, strategy="any"
    )
    checkpoint = Checkpoint(Path(folder, "run"))
    return sorted(checkpoint.tensors("model")), dict(checkpoint.items["model"].aliases)


def test_tied_tensors_are_written_once_whoever_holds_them(tmp_path: Path) -> None:
    for names, aliases in run_ranks(tied, 2, str(tmp_path)):
        assert names == ["a", "b", "x", "y", "z"]
        assert aliases == {"x": "y"}
    back = Checkpoint(tmp_path / "run").read("model")
    assert back["a"].tolist() == back["b"].tolist() == [0, 1, 2, 3]
    assert back["x"] is back["y"]
    assert torch.equal(back["z"], back["x"])
