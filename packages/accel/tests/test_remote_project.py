"""A run whose folder is a URL saves, resumes and prunes there as on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from accel import Accelerator, CheckpointError, ConfigError, ProjectConfiguration
from accel_state import Process
from accel_state.process import ProcessSettings
from accel_state.testing import rank_environment, run_ranks

RUN = "memory://bucket/run"
CPU = ProcessSettings(device="cpu")


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def prepared(**options: Any) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return accelerator, model, optimizer


def step(accelerator: Accelerator, model: Any, optimizer: Any) -> float:
    loss = model(torch.randn(4, 3)).square().sum()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def numbers() -> list[str]:
    return sorted({name.split("/")[4] for name in MemoryFileSystem.store})


@pytest.mark.parametrize("blocking", [True, False])
def test_a_run_goes_on_from_its_latest_there(blocking: bool) -> None:
    project = ProjectConfiguration(project_dir=RUN, total_limit=2)
    accelerator, model, optimizer = prepared(project_config=project)
    assert accelerator.project_dir == RUN
    assert accelerator.load_state() is None
    for _ in range(4):
        step(accelerator, model, optimizer)
        accelerator.save_state(blocking=blocking)
    expected = [step(accelerator, model, optimizer) for _ in range(3)]
    accelerator.end_training()
    assert numbers() == ["checkpoint_2", "checkpoint_3"]

    accelerator, model, optimizer = prepared(project_config=project)
    assert accelerator.load_state() == f"{RUN}/checkpoints/checkpoint_3"
    assert [step(accelerator, model, optimizer) for _ in range(3)] == expected
    for _ in range(3):
        accelerator.save_state(blocking=blocking)
    accelerator.end_training()
    assert numbers() == ["checkpoint_3", "checkpoint_5", "checkpoint_6"]  # also the one resumed from


def test_a_place_by_name_is_replaced_and_read() -> None:
    accelerator, model, optimizer = prepared()
    assert accelerator.save_state(f"{RUN}/last/") == f"{RUN}/last"
    step(accelerator, model, optimizer)
    accelerator.save_state(f"{RUN}/last")
    weight = model.weight.detach().clone()
    step(accelerator, model, optimizer)
    assert accelerator.load_state(f"{RUN}/last") == f"{RUN}/last"
    assert torch.equal(model.weight, weight)
    with pytest.raises(CheckpointError, match=r"`memory://bucket/run/other` holds no `manifest\.json`"):
        accelerator.load_state(f"{RUN}/other")
    with pytest.raises(ConfigError, match="was given as a `Path`"):
        accelerator.save_state(Path(f"{RUN}/last"))
    accelerator.end_training()


def test_a_number_that_is_there_is_not_taken() -> None:
    accelerator, _, _ = prepared(project_config=ProjectConfiguration(project_dir=RUN))
    accelerator.save_state()
    accelerator.end_training()
    accelerator, _, _ = prepared(project_config=ProjectConfiguration(project_dir=RUN, iteration=0))
    with pytest.raises(ConfigError, match=r"names `memory://bucket/run/checkpoints/checkpoint_0`, which exists"):
        accelerator.save_state()
    accelerator.end_training()


def test_a_store_that_fails_is_said_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError("AccessDenied")

    accelerator, _, _ = prepared(project_config=ProjectConfiguration(project_dir=RUN, total_limit=1))
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "find", fail)
        for ask in (accelerator.load_state, accelerator.save_state):
            with pytest.raises(CheckpointError, match=r"What checkpoints are in .*AccessDenied"):
                ask()
    accelerator.save_state()
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "rm", fail)
        with pytest.raises(CheckpointError, match=r"new checkpoint is complete, but an old one .*AccessDenied"):
            accelerator.save_state()
    accelerator.end_training()


def test_trackers_write_to_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'jsonl' writes files.*`logging_dir`, which is no URL"):
        Accelerator(cpu=True, project_dir=RUN, log_with="jsonl").init_trackers("run")
    project = ProjectConfiguration(project_dir=RUN, logging_dir=tmp_path)
    accelerator = Accelerator(cpu=True, project_config=project, log_with="jsonl")
    accelerator.init_trackers("run")
    accelerator.end_training()
    assert list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logging_dir": RUN}, r"`logging_dir='memory://bucket/run'` is a URL.*Give a path"),
        ({"project_dir": RUN, "sync_to_disk": False}, "`sync_to_disk=False` concerns a disk.*Leave it out"),
    ],
)
def test_settings_that_mean_nothing_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProjectConfiguration(**options)


def save_in_memory() -> None:
    with Process.open(CPU, environment=rank_environment()):
        accelerator, _, _ = prepared()
        for blocking in (True, False):
            with pytest.raises(ConfigError, match="is memory of one process, and this run has 2"):
                accelerator.save_state(RUN, blocking=blocking)
        accelerator.end_training()


def test_memory_of_one_process_holds_no_checkpoint_of_two() -> None:
    run_ranks(save_in_memory, 2, open_process=False)
