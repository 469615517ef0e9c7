"""What a checkpoint of an `Accelerator` holds, refuses and leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator, CheckpointError, ConfigError, ProjectConfiguration
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

CPU = ProcessSettings(device="cpu")


def script(folder: Path | None = None, *, num: int = 1, schedule: bool = True, **options: Any) -> tuple[Any, ...]:
    """An accelerator with `num` models, optimizers and loaders."""
    accelerator = Accelerator(cpu=True, project_dir=folder, **options)
    torch.manual_seed(0)
    models = [nn.Linear(2, 1) for _ in range(num)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    loaders = [DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2, shuffle=True) for _ in range(num)]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)] if schedule else []
    return accelerator, accelerator.prepare(*models, *optimizers, *loaders, *schedules)


def step(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    optimizer.zero_grad()


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_without_a_checkpoint_there_is_nothing_to_load(alone: None, tmp_path: Path) -> None:
    accelerator, _ = script(tmp_path)
    assert accelerator.load_state() is None


def test_the_latest_of_several_is_loaded(alone: None, tmp_path: Path) -> None:
    accelerator, (model, optimizer, *_) = script(tmp_path)
    saved = []
    for number in range(3):
        step(accelerator, model, optimizer)
        assert accelerator.save_state() == tmp_path / "checkpoints" / f"checkpoint_{number}"
        saved.append(weights(model))
    step(accelerator, model, optimizer)
    assert accelerator.load_state() == tmp_path / "checkpoints" / "checkpoint_2"
    assert all(torch.equal(one, two) for one, two in zip(weights(model), saved[2], strict=True))
    accelerator.load_state(tmp_path / "checkpoints" / "checkpoint_0")
    assert all(torch.equal(one, two) for one, two in zip(weights(model), saved[0], strict=True))
    assert optimizer.steps_taken == 1
    # Numbers go on after the highest, whatever was loaded.
    assert accelerator.save_state() == tmp_path / "checkpoints" / "checkpoint_3"


def test_the_oldest_go_when_there_are_too_many_but_not_the_one_resumed_from(alone: None, tmp_path: Path) -> None:
    project = ProjectConfiguration(project_dir=tmp_path, total_limit=2)
    accelerator, _ = script(project_config=project)
    for _ in range(3):
        accelerator.save_state()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_1", "checkpoint_2"]
    accelerator.load_state(folder / "checkpoint_1")
    accelerator.save_state()
    accelerator.save_state()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_1", "checkpoint_3", "checkpoint_4"]


def test_numbering_may_begin_elsewhere(alone: None, tmp_path: Path) -> None:
    accelerator, _ = script(project_config=ProjectConfiguration(project_dir=tmp_path, iteration=7))
    assert accelerator.save_state().name == "checkpoint_7"
    assert accelerator.save_state().name == "checkpoint_8"
    again, _ = script(project_config=ProjectConfiguration(project_dir=tmp_path, iteration=7))
    with pytest.raises(ConfigError, match=r"`ProjectConfiguration\(iteration=7\)` names .* which exists.*Leave `iter"):
        again.save_state()


def test_a_folder_that_is_named_is_overwritten(alone: None, tmp_path: Path) -> None:
    accelerator, (model, optimizer, *_) = script()
    accelerator.save_state(tmp_path / "best")
    step(accelerator, model, optimizer)
    assert accelerator.save_state(str(tmp_path / "best")) == tmp_path / "best"
    after = weights(model)
    step(accelerator, model, optimizer)
    accelerator.load_state(tmp_path / "best")
    assert all(torch.equal(one, two) for one, two in zip(weights(model), after, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_folder_of_something_else_is_not_overwritten(alone: None, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    accelerator, _ = script()
    with pytest.raises(CheckpointError, match=r"exists and is no checkpoint.*Name another folder"):
        accelerator.save_state(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("call", ["save_state", "load_state"])
def test_without_any_folder(call: str, alone: None) -> None:
    accelerator, _ = script()
    with pytest.raises(
        ConfigError, match=rf"`{call}\(\)` was called without a folder.*no `project_dir`.*Pass a folder"
    ):
        getattr(accelerator, call)()


@pytest.mark.parametrize("call", ["save_state", "load_state"])
def test_without_automatic_names(call: str, alone: None, tmp_path: Path) -> None:
    project = ProjectConfiguration(project_dir=tmp_path, automatic_checkpoint_naming=False)
    accelerator, _ = script(project_config=project)
    with pytest.raises(ConfigError, match=rf"`{call}\(\)`.*`automatic_checkpoint_naming=False` leaves naming to you"):
        getattr(accelerator, call)()


def test_two_of_everything_come_back_each_as_its_own(alone: None, tmp_path: Path) -> None:
    accelerator, (first, second, one, two, loader, other, schedule) = script(tmp_path, num=2)
    step(accelerator, first, one)
    schedule.step()
    step(accelerator, second, two)
    step(accelerator, second, two)
    next(iter(loader))
    for index, _ in enumerate(other):
        if index == 2:
            folder = accelerator.save_state()
            break
    expected = weights(first) + weights(second)
    fresh, (first, second, one, two, loader, other, schedule) = script(tmp_path, num=2)
    assert fresh.load_state() == folder
    assert all(torch.equal(a, b) for a, b in zip(weights(first) + weights(second), expected, strict=True))
    assert (one.steps_taken, two.steps_taken, schedule.scheduler.last_epoch) == (1, 2, 1)
    assert (loader.epoch, other.epoch, other.state_dict()["cursor"]) == (1, 0, 6)
    schedule.step()  # nothing was stepped since
    assert schedule.scheduler.last_epoch == 1


def test_tensors_in_lists_and_groups_of_an_optimizer_come_back_as_tensors(alone: None, tmp_path: Path) -> None:
    def trained(optimizer: Any, again: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        accelerator = Accelerator()
        model = nn.Linear(3, 3)
        model, optimizer = accelerator.prepare(model, optimizer(model.parameters()))
        inputs = torch.arange(12.0).reshape(4, 3) / 12

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = (model(inputs) - inputs.flip(0)).square().sum()
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
        if again:
            accelerator.save_state(tmp_path / "a")
            accelerator.load_state(tmp_path / "a")
        optimizer.step(closure)
        return weights(model)

    def remembering(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    def compilable(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.99)))

    for make in (remembering, compilable):
        for ours, theirs in zip(trained(make, True), trained(make, False), strict=True):
            assert torch.equal(ours, theirs)


def test_objects_that_do_not_match_are_named(alone: None, tmp_path: Path) -> None:
    accelerator, _ = script(tmp_path, num=2)
    accelerator.save_state()
    smaller, (model, *_) = script(tmp_path)
    before = weights(model)
    with pytest.raises(
        CheckpointError, match=r"also holds loader_1, model_1, optimizer_1.*Prepare and register the same"
    ):
        smaller.load_state()
    larger, _ = script(tmp_path, num=2)
    larger.register_for_checkpointing(torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1), 1))
    with pytest.raises(CheckpointError, match=r"lacks custom, so it does not fit"):
        larger.load_state()
    half, _ = script(tmp_path, num=2, mixed_precision="fp16", schedule=False)
    with pytest.raises(CheckpointError, match=r"lacks scaler and also holds scheduler,"):
        half.load_state()
    assert all(torch.equal(one, two) for one, two in zip(weights(model), before, strict=True))


def test_what_cannot_be_saved_is_refused_when_it_is_registered(alone: None) -> None:
    accelerator, _ = script()
    with pytest.raises(ConfigError, match=r"was given int, list, without `state_dict`.*both methods"):
        accelerator.register_for_checkpointing(1, [])


def damage(folder: Path, how: str, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def load_damaged(folder: str, how: str, name: str) -> tuple[str, bool, int]:
    """On a rank: load a damaged checkpoint. Returns the error, whether all is as before, and what came of saving."""
    accelerator, (model, optimizer, loader, schedule) = script(Path(folder))
    called: list[str] = []
    accelerator.register_load_state_pre_hook(lambda models, place: called.append(place))
    step(accelerator, model, optimizer)
    saved = accelerator.save_state()
    step(accelerator, model, optimizer)
    schedule.step()
    if accelerator.is_main_process:
        damage(saved, how, name)
    accelerator.wait_for_everyone()
    before = [*weights(model), torch.get_rng_state(), *(e for s in optimizer.state.values() for e in s.values())]
    before = [entry.clone() for entry in before]
    try:
        accelerator.load_state(saved)
    except CheckpointError as error:
        message = str(error)
    after = [*weights(model), torch.get_rng_state(), *(e for s in optimizer.state.values() for e in s.values())]
    same = all(torch.equal(one, two) for one, two in zip(before, after, strict=True)) and not called
    return message, same and optimizer.steps_taken == 2 and loader.epoch == 0, schedule.scheduler.last_epoch


@pytest.mark.parametrize("how", ["removed", "cut", "changed"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "loader.json", "rng_0.json", "rng_1.safetensors"]
)
def test_a_damaged_checkpoint_changes_nothing_on_any_rank(how: str, name: str, tmp_path: Path) -> None:
    for message, same, schedule in run_ranks(load_damaged, 2, str(tmp_path), how, name, settings=CPU):
        assert f"`{name}` of `{name.partition('.')[0]}`" in message
        assert "cannot be restored. Load another checkpoint." in message
        assert same
        assert schedule == 1


def test_a_folder_without_a_checkpoint(alone: None, tmp_path: Path) -> None:
    accelerator, _ = script()
    with pytest.raises(CheckpointError, match=r"holds no `manifest.json`, so it is no complete checkpoint"):
        accelerator.load_state(tmp_path / "nowhere")


def test_hooks_see_the_models_and_may_change_what_is_saved(alone: None, tmp_path: Path) -> None:
    accelerator, (model, *_) = script()
    seen: list[Any] = []

    def before_saving(models: list[Any], states: list[dict[str, Any]], folder: str) -> None:
        seen.append((models, folder))
        states[0]["bias"] = torch.full_like(states[0]["bias"], 5.0)

    accelerator.register_save_state_pre_hook(before_saving)
    accelerator.register_load_state_pre_hook(lambda models, folder: seen.append((models, folder)))
    accelerator.save_state(tmp_path / "saved")
    accelerator.load_state(tmp_path / "saved")
    assert seen == [([model], str(tmp_path / "saved"))] * 2
    assert model.bias.item() == 5.0


def other_world(folder: str) -> tuple[int, float]:
    accelerator, (model, optimizer, *_) = script(Path(folder))
    accelerator.load_state()
    if optimizer.steps_taken == 0:
        step(accelerator, model, optimizer)
        accelerator.save_state()
    return optimizer.steps_taken, accelerator.unwrap_model(model).weight.sum().item()


def test_another_number_of_processes_restores_models_and_optimizers(tmp_path: Path) -> None:
    saved = run_ranks(other_world, 2, str(tmp_path), settings=CPU)
    assert run_ranks(other_world, 1, str(tmp_path), settings=CPU) == saved[:1]
    assert run_ranks(other_world, 3, str(tmp_path), settings=CPU) == saved[:1] * 3


def test_nothing_in_a_checkpoint_is_pickled(alone: None, tmp_path: Path) -> None:
    accelerator, _ = script(tmp_path, mixed_precision="fp16")
    folder = accelerator.save_state()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert "scaler.json" in {path.name for path in folder.iterdir()}


class Named:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Other(Named):
    pass


def test_a_state_of_another_class_is_refused_or_waived(
    alone: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator, _ = script(tmp_path)
    accelerator.register_for_checkpointing(Named(1), Other(2))
    accelerator.save_state()
    again = Accelerator(cpu=True, project_dir=tmp_path)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    model, optimizer, _, schedule = again.prepare(
        model, optimizer, DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2, shuffle=True), schedule
    )
    objects = Other(3), Named(4)
    again.register_for_checkpointing(*objects)
    with pytest.raises(CheckpointError, match=r"`optimizer` of a AdamW, here a SGD.*same order") as caught:
        again.load_state()
    for name in ("`scheduler` of a StepLR", "`custom` of a Named, here a Other", "`custom_1` of a Other"):
        assert name in str(caught.value)
    again.load_state(strict=False)
    assert "`optimizer` is of a AdamW in the checkpoint and a SGD here, and stays as it is" in caplog.text
    assert [each.value for each in objects] == [3, 4]
    step(again, model, optimizer)


def test_settings_of_groups_follow_their_parameters(alone: None, tmp_path: Path) -> None:
    def made(order: int) -> tuple[Accelerator, Any]:
        accelerator = Accelerator(cpu=True, project_dir=tmp_path)
        model = nn.Linear(2, 1)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}][::order]
        return accelerator, accelerator.prepare(model, torch.optim.SGD(groups))[1]

    accelerator, _ = made(1)
    accelerator.save_state()
    accelerator, optimizer = made(-1)
    accelerator.load_state(strict=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_weights_are_not_written_into_a_checkpoint(alone: None, tmp_path: Path) -> None:
    accelerator, (model, *_) = script(tmp_path)
    folder = accelerator.save_state()
    with pytest.raises(CheckpointError, match="is a checkpoint, whose own weights these would replace"):
        accelerator.save_model(model, folder)
    assert accelerator.load_state() == folder


def failing_on_one(folder: str, how: str) -> str:
    accelerator, _ = script(Path(folder))
    rank = accelerator.process_index

    def hook(*_: Any) -> None:
        if rank == 1:
            raise KeyError("a bug of the user's")

    accelerator.save_state()
    if how == "save":
        accelerator.register_save_state_pre_hook(hook)
    else:
        accelerator.register_load_state_pre_hook(hook)
    with pytest.raises((KeyError, CheckpointError)) as caught:  # both are looked at
        accelerator.save_state() if how == "save" else accelerator.load_state()
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("how", ["save", "load"])
def test_a_hook_that_fails_on_one_rank_is_heard_of_on_all(tmp_path: Path, how: str) -> None:
    one, two = run_ranks(failing_on_one, 2, str(tmp_path), how, settings=CPU, timeout_s=60)
    assert one.startswith("CheckpointError: ")
    assert "on rank(s) [1], whose output tells why" in one
    assert two == 'KeyError: "a bug of the user\'s"'
