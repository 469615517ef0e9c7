"""What was saved on some processes is read on others, however each spreads it: the same bits, and no copy of all."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import (
    Accelerator,
    DataLoaderConfiguration,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    Process,
    ProjectConfiguration,
)
from accel_parallel.checkpoint import Checkpoint
from accel_parallel.checkpoint import outgoing as outgoing_module
from accel_parallel.checkpoint.plan import plan_files
from accel_parallel.sharded import is_sharded, local_of
from accel_parallel.sharded import whole as whole_of
from accel_state.process import ProcessSettings
from accel_state.testing import rank_environment, run_ranks

ROWS, GLOBAL_BATCH, STEPS = 66, 12, 4
"""Five and a half batches an epoch, so that the second part begins in the middle of one and ends in the next."""
PLAN = {"layers.*.0": "colwise", "layers.*.2": "rowwise"}
SHARD = {"fsdp_plugin": FullyShardedDataParallelPlugin()}
HYBRID = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}
TENSOR = {"parallelism_config": ParallelismConfig(tp_size=2, tp_plan=PLAN)}
CHAINS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "ddp 2, 1, 3": [(2, {}), (1, {}), (3, {})],
    "fsdp 2, 3, 1, 2": [(2, SHARD), (3, SHARD), (1, SHARD), (2, SHARD)],
    "hsdp 4, fsdp 2, hsdp 4": [(4, HYBRID), (2, SHARD), (4, HYBRID)],
    "tp 2, one, fsdp 2, tp 2": [(2, TENSOR), (1, {}), (2, SHARD), (2, TENSOR)],
}
"""Processes, and arguments of the Accelerator, of each run; it goes on where the one before it ended."""


class Net(nn.Module):
    """With sizes that nothing divides evenly, single numbers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 7)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 7)) for _ in range(2))
        self.leave = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen: torch.Tensor
        self.seen += 1
        hidden = self.enter(rows)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        out: torch.Tensor = self.leave(hidden) * self.scale
        return out


class Part(NamedTuple):
    """What one run of a chain saw."""

    loaded: dict[str, Any]
    """Every number of the model, the optimizer, the scheduler and the loader once it had loaded."""
    seen: list[list[int]]
    norms: list[float]
    """Of the gradients of each step, over all ranks."""
    left: dict[str, Any]
    """The same once it had saved."""
    spread: list[str]
    """Files of weights and of the optimizer's state that were written."""


def open_for(arguments: dict[str, Any]) -> None:
    """As a launcher would have it."""
    parallelism: ParallelismConfig | None = arguments.get("parallelism_config")
    mesh = None if parallelism is None else parallelism.mesh_shape()
    Process.open(ProcessSettings(device="cpu", mesh=mesh), environment=rank_environment())


def numbers_of(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, scheduler: Any) -> dict[str, Any]:
    """Gathered over ranks, by torch and not by way of files. Every rank must call this."""
    module = accelerator.unwrap_model(model)
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, Any] = {name: whole_of(tensor).clone() for name, tensor in module.state_dict().items()}
    for parameter, entries in optimizer.state.items():
        for name, entry in entries.items():
            found[f"{names[parameter]}.{name}"] = whole_of(entry).clone()
    found["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    found["steps_taken"] = optimizer.steps_taken
    found["scheduler"] = scheduler.scheduler.last_epoch, scheduler.get_last_lr()
    found["loader"] = loader.epoch, loader.state_dict()["cursor"]
    return found


@contextmanager
def several_files() -> Any:
    """Sizes at which the little of these tests is worth several files, and so several ranks that write."""
    with ExitStack() as stack:
        plan = partial(plan_files, smallest=500, largest=2000)
        stack.enter_context(patch.object(outgoing_module, "plan_files", plan))
        yield


def run(arguments: dict[str, Any], folder: Path, steps: int, background: bool) -> Part:
    """On a rank: a user's script, which goes on from the last checkpoint, and ends with another."""
    open_for(arguments)
    project = ProjectConfiguration(project_dir=folder, sync_to_disk=False)
    data = DataLoaderConfiguration(data_seed=4)
    accelerator = Accelerator(cpu=True, project_config=project, dataloader_config=data, **arguments)
    torch.manual_seed(0 if not (folder / "checkpoints").exists() else 1)  # what is loaded is another one
    model: Any = Net().double()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    optimizer: Any = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}], lr=0.01, amsgrad=True
    )
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    rows = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch_size = GLOBAL_BATCH // accelerator.process.topology.data_world_size
    loader: Any = DataLoader(TensorDataset(rows, torch.arange(ROWS)), batch_size=batch_size, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    prepared = (accelerator, model, optimizer, loader, scheduler)
    accelerator.load_state()
    loaded = numbers_of(*prepared)
    seen: list[list[int]] = []
    norms: list[float] = []
    while len(seen) < steps:
        for values, numbers in loader:
            real = loader.batch_info.real_rows[accelerator.data_parallel_rank]
            loss = (model(values) - values.flip(1))[:real].square().sum()
            accelerator.backward(loss, num_items=real)
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen.append(accelerator.gather_for_metrics(numbers).tolist())
            if len(seen) == steps:  # in the middle of an epoch
                with several_files():
                    if background:
                        accelerator.save_state(blocking=False).wait()
                    else:
                        accelerator.save_state()
                left = numbers_of(*prepared)
                break
    latest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))
    accelerator.end_training()
    return Part(loaded, seen, norms, left, sorted(path.name for path in latest.glob("*-of-*.safetensors")))


def start(world: int, arguments: dict[str, Any], folder: Path, steps: int, background: bool = False) -> list[Part]:
    return run_ranks(run, world, arguments, folder, steps, background, open_process=False, timeout_s=100)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """The undisturbed run of one process."""
    (part,) = start(1, {}, tmp_path_factory.mktemp("alone"), max(map(len, CHAINS.values())) * STEPS)
    return part


@pytest.mark.parametrize("chain", sorted(CHAINS))
def test_every_bit_goes_from_one_world_to_another(tmp_path: Path, chain: str, alone: Part) -> None:
    before: Part | None = None
    for number, (world, arguments) in enumerate(CHAINS[chain]):
        # Saves block and do not in turn.
        parts = start(world, arguments, tmp_path, STEPS, background=number % 2 == 1)
        for part in parts:
            if before is not None:
                assert part.loaded.keys() == before.left.keys()
                assert [name for name in before.left if not same(part.loaded[name], before.left[name])] == []
            first = number * STEPS
            assert part.seen == alone.seen[first : first + STEPS]
            assert part.norms == pytest.approx(alone.norms[first : first + STEPS], rel=1e-10)
        before = parts[0]
        # Divided ones are written by several; what is whole everywhere, by the main process in files of such a size.
        assert len([name for name in before.spread if name.startswith("model")]) > (arguments != {} and world > 1)
        checkpoint = Checkpoint(tmp_path / "checkpoints" / f"checkpoint_{number}")
        checkpoint.verify()
        assert checkpoint.manifest.world_size == world


# Memory

LAYERS, WIDTH = 12, 2048
TENSOR_BYTES = 4 * WIDTH * WIDTH
STAGING_BYTES = 24 << 20
"""Four threads that prove files hold a few MB each; the rest is what Python and torch allocate on the way."""


class Peak:
    """The most memory that this process had to itself while it was inside, files that are mapped left out."""

    def __enter__(self) -> Peak:
        gc.collect()
        libc = ctypes.CDLL(None)
        getattr(libc, "malloc_trim", abs)(0)  # what is free would be used again unseen
        # M_MMAP_THRESHOLD (mallopt(3)). Left alone it grows to 32 MB, and glibc keeps freed tensors that stay below it.
        getattr(libc, "mallopt", max)(-3, 1 << 20)
        self.before = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, resident())
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident() -> int:
    """Bytes of memory that is no file's."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) << 10


def large(arguments: dict[str, Any], folder: Path, stepped: bool) -> tuple[Any, ...]:
    open_for(arguments)
    accelerator = Accelerator(
        cpu=True, project_config=ProjectConfiguration(project_dir=folder, sync_to_disk=False), **arguments
    )
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    if stepped:
        accelerator.backward(model(torch.ones(1, WIDTH)).sum())
        optimizer.step()
        optimizer.zero_grad()
    return accelerator, model, optimizer


def save_large(arguments: dict[str, Any], folder: Path) -> float:
    accelerator, model, _ = large(arguments, folder, stepped=True)
    accelerator.save_state()
    total = sum(whole_of(each).double().sum().item() for each in model.parameters())
    accelerator.end_training()
    return total


def load_large(arguments: dict[str, Any], folder: Path) -> tuple[int, int, float]:
    """On a rank: memory besides that of what was loaded, bytes of its largest part, and a sum of weights."""
    accelerator, model, optimizer = large(arguments, folder, stepped=False)
    with Peak() as memory:
        accelerator.load_state()
    new = sum(local_of(each["momentum_buffer"]).nbytes for each in optimizer.state.values())
    own = max(local_of(each).nbytes for each in model.parameters())
    assert all(is_sharded(each["momentum_buffer"]) == bool(arguments) for each in optimizer.state.values())
    total = sum(whole_of(each).double().sum().item() for each in model.parameters())
    accelerator.end_training()
    return memory.peak - memory.before - new, own, total


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint of 200 MB of weights and as much of an optimizer, by two processes."""
    folder = tmp_path_factory.mktemp("large")
    return folder, run_ranks(save_large, 2, SHARD, folder, open_process=False)[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux's /proc")
@pytest.mark.parametrize(
    ("world", "arguments"),
    [
        pytest.param(1, {}, id="one"),
        pytest.param(2, SHARD, id="fsdp 2"),
    ],
)
def test_loading_needs_little_more_than_what_is_loaded(
    written: tuple[Path, float], world: int, arguments: dict[str, Any]
) -> None:
    folder, expected = written
    for extra, own, total in run_ranks(load_large, world, arguments, folder, open_process=False):
        assert own == TENSOR_BYTES // world
        assert extra <= own + STAGING_BYTES
        assert total == pytest.approx(expected, rel=1e-12)
