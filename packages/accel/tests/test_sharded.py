"""One script on every mesh: the same losses and metrics, and checkpoints that each of them reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import (
    Accelerator,
    CheckpointError,
    ConfigError,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    Process,
)
from accel_state.process import ProcessSettings
from accel_state.testing import rank_environment, run_ranks

_PLAN = {"layers.*.0": "colwise", "layers.*.2": "rowwise"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2))
        self.leave = nn.Linear(8, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.enter(rows)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        out: torch.Tensor = self.leave(hidden)
        return out


class Setting(NamedTuple):
    """One way of spreading."""

    name: str
    world_size: int
    kind: str
    arguments: dict[str, Any]


_FULL = {"state_dict_type": "FULL_STATE_DICT"}
SETTINGS = (
    Setting("one process", 1, "NO", {}),
    Setting("ddp", 2, "MULTI_CPU", {}),
    Setting("fsdp", 2, "FSDP", {"fsdp_plugin": FullyShardedDataParallelPlugin()}),
    Setting("fsdp, whole states", 2, "FSDP", {"fsdp_plugin": FullyShardedDataParallelPlugin(**_FULL)}),
    Setting("fsdp alone", 1, "FSDP", {"fsdp_plugin": FullyShardedDataParallelPlugin()}),
    Setting("hsdp", 4, "FSDP", {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}),
    Setting("tp", 2, "FSDP", {"parallelism_config": ParallelismConfig(tp_size=2, tp_plan=_PLAN)}),
    Setting(
        "tp x fsdp", 4, "FSDP", {"parallelism_config": ParallelismConfig(dp_shard_size=2, tp_size=2, tp_plan=_PLAN)}
    ),
)
_ROWS = 22
_GLOBAL_BATCH = 4


def _train(arguments: dict[str, Any], folder: Path, epochs: int) -> dict[str, Any]:
    """A user's script: nothing in it knows how it is spread. Resumes where it can."""
    _open(arguments)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, project_dir=folder, **arguments)
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(_ROWS, 6, generator=generator, dtype=torch.float64)
    dataset = TensorDataset(rows, torch.randint(3, (_ROWS,), generator=generator), torch.arange(_ROWS))
    num_data = accelerator.process.topology.data_world_size
    loader: Any = DataLoader(dataset, batch_size=_GLOBAL_BATCH // num_data, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    accelerator.load_state()
    seen: list[list[int]] = []
    norms: list[float] = []
    for _ in range(loader.epoch, epochs):
        ids: list[int] = []
        named: list[str] = []
        for rows, labels, numbers in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                info = loader.batch_info
                real = info.real_rows[accelerator.data_parallel_rank]
                losses = nn.functional.cross_entropy(model(rows), labels, reduction="none")
                accelerator.backward(losses[:real].sum(), num_items=real)
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                scheduler.step()
                if accelerator.sync_gradients:
                    norms.append(float(norm))
            ids += accelerator.gather_for_metrics(numbers).tolist()
            named += accelerator.gather_for_metrics([f"row {n}" for n in numbers.tolist()], use_gather_object=True)
        assert named == [f"row {n}" for n in ids]
        seen.append(ids)
        accelerator.save_state()
    state = accelerator.get_state_dict(model)
    kind = accelerator.distributed_type
    assert isinstance(kind, DistributedType)
    accelerator.end_training()
    return {"seen": seen, "norms": norms, "state": state, "kind": kind.value}


def _run(setting: Setting, folder: Path, epochs: int) -> list[dict[str, Any]]:
    return run_ranks(_train, setting.world_size, setting.arguments, folder, epochs, open_process=False, timeout_s=100)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run of one process."""
    return _run(SETTINGS[0], tmp_path_factory.mktemp("alone"), 3)[0]


def _check(answers: list[dict[str, Any]], alone: dict[str, Any], epochs: int) -> None:
    for rank, answer in enumerate(answers):
        assert answer["seen"] == alone["seen"][-epochs:]
        assert answer["norms"] == pytest.approx(alone["norms"][-len(answer["norms"]) :], abs=1e-10)
        if rank == 0:
            assert answer["state"].keys() == alone["state"].keys()
            for name, value in answer["state"].items():
                torch.testing.assert_close(value, alone["state"][name], rtol=0, atol=1e-10, msg=name)


_MANY = pytest.mark.matrix


@pytest.mark.parametrize(
    "setting",
    [pytest.param(each, marks=[_MANY] if each.name in ("ddp", "fsdp alone", "tp") else []) for each in SETTINGS[1:]],
    ids=lambda setting: setting.name,
)
def test_one_script_trains_alike_however_it_is_spread(setting: Setting, tmp_path: Path, alone: dict[str, Any]) -> None:
    answers = _run(setting, tmp_path, 3)
    _check(answers, alone, 3)
    assert answers[0]["kind"] == setting.kind
    if setting.kind == "FSDP":
        assert all(answer["state"] == {} for answer in answers[1:])


BY_NAME = {setting.name: setting for setting in SETTINGS}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("fsdp", "one process", marks=_MANY),
        ("fsdp", "tp x fsdp"),
        ("ddp", "fsdp"),
        pytest.param("tp x fsdp", "ddp", marks=_MANY),
        pytest.param("fsdp, whole states", "hsdp", marks=_MANY),
        ("hsdp", "fsdp, whole states"),
    ],
)
def test_a_checkpoint_of_one_way_is_read_by_another(
    first: str, second: str, tmp_path: Path, alone: dict[str, Any]
) -> None:
    _run(BY_NAME[first], tmp_path, 2)
    answers = _run(BY_NAME[second], tmp_path, 3)
    _check(answers, alone, 1)


def _open(arguments: dict[str, Any]) -> None:
    """What a launcher's variables would let the Accelerator do by itself."""
    parallelism: ParallelismConfig | None = arguments.get("parallelism_config")
    environment = rank_environment()
    mesh = None
    if parallelism is not None and parallelism.total_size == environment.world_size:
        mesh = parallelism.mesh_shape()
    Process.open(ProcessSettings(mesh=mesh), environment=environment)


def _refused(arguments: dict[str, Any]) -> str:
    _open(arguments)
    try:
        Accelerator(cpu=True, **arguments)
    except ConfigError as error:
        return str(error)
    finally:
        if Process.is_open():
            Process.current().close()
    return "nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parallelism_config": ParallelismConfig(tp_size=3)}, "tp_size=3 = 3 process.* has 2"),
        (
            {
                "parallelism_config": ParallelismConfig(dp_replicate_size=2),
                "fsdp_plugin": FullyShardedDataParallelPlugin(),
            },
            "gives each a whole copy. Set `dp_shard_size=2`",
        ),
        (
            {
                "fsdp_plugin": FullyShardedDataParallelPlugin(),
                "kwargs_handlers": [DistributedDataParallelKwargs(static_graph=True)],
            },
            "DistributedDataParallelKwargs, which has no effect on the strategy `fsdp`",
        ),
        (
            {
                "fsdp_plugin": FullyShardedDataParallelPlugin(sharding_strategy="HYBRID_SHARD"),
                "parallelism_config": ParallelismConfig(cp_size=2),
            },
            r"hybrid sharding strategy shards within each of 1 node\(s\) of 2 process.*cp=2",
        ),
        (
            {"fsdp_plugin": FullyShardedDataParallelPlugin(mixed_precision_policy="fp16")},
            "computes in fp16, and the run's `mixed_precision='no'` decides on loss scaling",
        ),
        (
            {"fsdp_plugin": FullyShardedDataParallelPlugin(reshard_after_forward=4)},
            "groups of 4 processes, and 2 share a copy.* Use 2, or True",
        ),
    ],
    ids=["another world", "nothing to shard over", "options of DDP", "nodes and sizes", "unscaled float16", "groups"],
)
def test_what_would_have_no_effect_is_refused(arguments: dict[str, Any], message: str) -> None:
    for found in run_ranks(_refused, 2, arguments, open_process=False):
        assert re.search(message, found), found


def _stale_optimizer() -> str:
    Process.open(environment=rank_environment())
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin())
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model)
    try:
        accelerator.prepare(optimizer)
    except ConfigError as error:
        return str(error)
    finally:
        accelerator.process.close()
    return "nothing"


def test_an_optimizer_of_parameters_from_before_sharding_is_refused() -> None:
    for found in run_ranks(_stale_optimizer, 2, open_process=False):
        assert "belong to no prepared model" in found
        assert "prepare both together" in found


class _Average:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]


def _unread_or_unsaved(folder: Path) -> tuple[str, str]:
    plugin = FullyShardedDataParallelPlugin(weights_path=folder / "weights.safetensors")
    with pytest.raises(ConfigError, match="`weights_path=") as unread:
        Accelerator(cpu=True, fsdp_plugin=plugin).prepare(Net())
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin())
    model = accelerator.prepare(Net())
    accelerator.register_for_checkpointing(_Average(model.enter.weight))
    with pytest.raises(CheckpointError, match="`custom`") as unsaved:
        accelerator.save_state(folder / "saved")
    return str(unread.value), str(unsaved.value)


def test_weights_that_nobody_reads_and_shards_that_nobody_gathers_are_refused(tmp_path: Path) -> None:
    save_file(Net().state_dict(), tmp_path / "weights.safetensors")
    for unread, unsaved in run_ranks(_unread_or_unsaved, 2, tmp_path):
        assert "nothing of Net is, so that the file would not be read" in unread
        assert "`weight` of `custom` is divided over processes" in unsaved
        assert "`tensor.full_tensor()`" in unsaved


def _each_row() -> list[int]:
    sizes = ParallelismConfig(dp_shard_size=2, tp_size=2, tp_plan=_PLAN)
    _open({"parallelism_config": sizes})
    accelerator = Accelerator(cpu=True, parallelism_config=sizes)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(5)), batch_size=2))
    rows = [row for (batch,) in loader for row in accelerator.gather_for_metrics(batch).tolist()]
    accelerator.process.close()
    return rows


def test_rows_that_ranks_share_and_padding_repeats_count_once() -> None:
    assert run_ranks(_each_row, 4, open_process=False) == [[0, 1, 2, 3, 4]] * 4
