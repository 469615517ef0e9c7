"""Bad input: what was given, why it cannot work, what to change."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accel import (
    Accelerator,
    ConfigError,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from accel_state.config import LaunchSettings
from accel_state.env import RUN_CONFIG_VARIABLE
from accel_state.process import Process, ProcessSettings
from accel_state.testing import run_ranks


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("foreign", "name"), [("a string", "str"), (None, "NoneType"), (torch.ones(2), "Tensor"), ([1], "list")]
)
def test_something_that_is_not_prepared_at_all(foreign: Any, name: str, alone: None) -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(
        ConfigError,
        match=rf"was given a {name} as argument number 3, and it prepares models, optimizers, data loaders and "
        r"learning-rate schedulers\. Leave it out of the call\.",
    ):
        Accelerator(cpu=True).prepare(model, optimizer, foreign)


def prepare_twice(kind: str) -> str:
    accelerator = Accelerator(cpu=True)
    model, optimizer = model_and_optimizer()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    prepared = accelerator.prepare(model, optimizer, schedule)
    again = {"model": model, "wrapped model": prepared[0], "optimizer": prepared[1], "raw optimizer": optimizer}
    try:
        accelerator.prepare(again.get(kind, prepared[2]))
    except ConfigError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("kind", "problem", "remedy"),
    [
        ("model", "is prepared already", "use what it returned"),
        ("wrapped model", "is prepared already", "use what it returned"),
        ("optimizer", "is prepared already", "use what it returned"),
        ("raw optimizer", "both hold a parameter of shape (1, 2)", "Give each parameter to one optimizer"),
        ("scheduler", "is prepared already", "use what it returned"),
    ],
)
def test_preparing_twice(world: int, kind: str, problem: str, remedy: str) -> None:
    for message in run_ranks(prepare_twice, world, kind, settings=ProcessSettings(device="cpu")):
        assert problem in message
        assert remedy in message


def test_a_loader_that_is_prepared_already_comes_back(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(range(4)))
    assert accelerator.prepare(loader) is loader
    assert len(accelerator._loaders) == 1


def test_an_optimizer_of_another_model(alone: None) -> None:
    model, _ = model_and_optimizer()
    with pytest.raises(ConfigError, match=r"SGD\) holds 2 of 2 parameters.*belong to no prepared model.*prepare both"):
        Accelerator(cpu=True).prepare(model, model_and_optimizer()[1])


def test_a_scheduler_of_an_optimizer_that_is_not_prepared(alone: None) -> None:
    _, optimizer = model_and_optimizer()
    with pytest.raises(
        ConfigError, match=r"StepLR belongs to an optimizer \(SGD\) that is not prepared.*together with"
    ):
        Accelerator(cpu=True).prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1))


def test_accumulating_a_model_that_is_not_prepared(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*model_and_optimizer())
    with pytest.raises(ConfigError, match=r"`accumulate` was given a Linear that is not prepared.*Pass what `prepare`"):
        accelerator.accumulate(nn.Linear(2, 1))


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_parameters_of_nobody(clip: str, alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*model_and_optimizer())
    with pytest.raises(ConfigError, match=r"The 2 parameters to clip belong to no prepared optimizer.*Pass the param"):
        getattr(accelerator, clip)(nn.Linear(2, 1).parameters(), 1.0)


@pytest.mark.parametrize(
    ("clip", "bound"), [("clip_grad_norm_", -1.0), ("clip_grad_value_", -0.5), ("clip_grad_value_", float("nan"))]
)
def test_clipping_to_no_bound(clip: str, bound: float, alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(*model_and_optimizer())
    accelerator.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(ConfigError, match=rf"={bound}` is no bound.*Give a number of zero or more"):
        getattr(accelerator, clip)(model.parameters(), bound)


@pytest.mark.parametrize("steps", [0, -2, 1.5, True])
def test_a_window_of_no_micro_batches(steps: Any, alone: None) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"`gradient_accumulation_steps={steps}` \(argument of Accelerator\).*Give a positive integer",
    ):
        Accelerator(cpu=True, gradient_accumulation_steps=steps)
    with pytest.raises(ConfigError, match=rf"`num_steps={steps}` is not a number of micro-batches"):
        Accelerator(cpu=True).gradient_accumulation_steps = steps


def test_two_lengths_of_a_window(alone: None) -> None:
    with pytest.raises(ConfigError, match=r"`gradient_accumulation_steps=2` and a .*`num_steps=3` were both given"):
        Accelerator(
            cpu=True,
            gradient_accumulation_steps=2,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3),
        )


def test_an_unknown_precision_given_as_an_argument(alone: None) -> None:
    with pytest.raises(
        ConfigError,
        match=r"`mixed_precision='bf61'` \(argument of Accelerator\) is not a precision.*Did you mean 'bf16'\?",
    ):
        Accelerator(cpu=True, mixed_precision="bf61")  # type: ignore[arg-type]


def test_an_unknown_precision_given_to_the_launcher(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LaunchSettings(values={"mixed_precision": "int3"}, sources={"mixed_precision": "--mixed-precision"})
    monkeypatch.setenv(RUN_CONFIG_VARIABLE, settings.to_json())
    with pytest.raises(ConfigError, match=r"`mixed_precision='int3'` \(--mixed-precision\) is not a precision"):
        Accelerator(cpu=True)


def test_an_unknown_tracker(alone: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'jsonk'.*Did you mean 'jsonl'"):
        Accelerator(cpu=True, log_with="jsonk", project_dir=tmp_path)


@pytest.mark.parametrize("call", ["log", "init_trackers", "get_tracker"])
def test_logging_without_a_tracker(call: str, alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    argument: Any = {"loss": 1.0} if call == "log" else "run"
    with pytest.raises(ConfigError, match=rf"`{call}` was called, but no tracker was asked for.*log_with='jsonl'"):
        getattr(accelerator, call)(argument)


def test_late_and_different_settings(alone: None) -> None:
    Accelerator(cpu=True)
    late = InitProcessGroupKwargs(timeout=timedelta(seconds=5))
    with pytest.raises(
        ConfigError, match=r"open with other settings: `timeout_s` is 1800.0 and 5.0 was given.*`close\(\)` it first"
    ):
        Accelerator(cpu=True, kwargs_handlers=[late])
    assert Accelerator(cpu=True).process is Process.current()  # the same again is the same process
    assert Accelerator().process is Process.current()  # and so is nothing in particular


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "3", "WORLD_SIZE": "2"}, r"`rank=3` lies outside 0..1.*Check the variables"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"`world_size=0`"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, r"`rank=-1` lies outside 0..1"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, r"`RANK=zero` is not a whole number.*Correct the variable"),
        ({"RANK": "0"}, r"`WORLD_SIZE` is not set, but `RANK` is.*Set both, or neither"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"2 processes, but where rank 0 listens is not known.*Set MASTER_ADDR and"),
    ],
)
def test_a_world_that_does_not_match(
    variables: dict[str, str], message: str, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Accelerator(cpu=True)


def test_options_of_one_kind_twice_or_of_no_kind(alone: None) -> None:
    with pytest.raises(ConfigError, match=r"holds DistributedDataParallelKwargs twice.*Give one\."):
        Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(), DistributedDataParallelKwargs()])
    with pytest.raises(ConfigError, match=r"holds a dict, which sets nothing known here\. Use Distributed"):
        Accelerator(cpu=True, kwargs_handlers=[{}])  # type: ignore[list-item]


def test_loss_scaling_where_there_is_none(alone: None) -> None:
    with pytest.raises(ConfigError, match=r"Leave it out, or use `mixed_precision='fp16'`"):
        Accelerator(cpu=True, kwargs_handlers=[GradScalerKwargs(init_scale=8.0)])


def test_two_project_folders(alone: None, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`project_dir='one'` \(argument of Accelerator\).*name two folders\. Give one"
    ):
        Accelerator(cpu=True, project_dir="one", project_config=ProjectConfiguration(project_dir="two"))
    limited = ProjectConfiguration(total_limit=3, iteration=2)
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, project_config=limited)
    assert (accelerator.project_dir, accelerator.project_configuration.total_limit) == (tmp_path, 3)


@pytest.mark.parametrize("number", [0, -1, True, "two"])
def test_a_limit_that_counts_nothing(number: Any) -> None:
    with pytest.raises(ConfigError, match=r"`total_limit=.* cannot count checkpoints. Give an integer of at least 1"):
        ProjectConfiguration(project_dir="here", total_limit=number)


def test_limits_of_names_that_are_not_made() -> None:
    with pytest.raises(ConfigError, match=r"`automatic_checkpoint_naming=False` turns those off"):
        ProjectConfiguration(project_dir="here", automatic_checkpoint_naming=False, total_limit=2)


def wrapped_by_two() -> str:
    first, second = Accelerator(), Accelerator()
    model = first.prepare(nn.Linear(2, 1))
    try:
        second.prepare(model)
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


def test_a_model_that_another_accelerator_has_wrapped() -> None:
    for message in run_ranks(wrapped_by_two, 2):
        assert "is a DistributedDataParallel already, of this script or of another Accelerator" in message


def gather_at_the_end() -> str:
    accelerator = Accelerator()
    accelerator.end_training()
    try:
        accelerator.gather(torch.ones(1))
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


def test_a_collective_after_the_end() -> None:
    for message in run_ranks(gather_at_the_end, 2):
        assert "was closed, so its peers cannot be reached any more" in message


def test_a_generator_that_would_pollute_an_unfinished_window(alone: None) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    critic, critic_optimizer = model_and_optimizer()
    author = nn.Linear(1, 2)
    author_optimizer = torch.optim.SGD(author.parameters(), lr=0.1)
    critic, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
    author, author_optimizer = accelerator.prepare(author, author_optimizer)
    with accelerator.accumulate(critic):
        accelerator.backward(critic(torch.ones(1, 2)).sum())
    critic.requires_grad_(False)
    with accelerator.accumulate(author):
        accelerator.backward(critic(author(torch.ones(1, 1))).sum())
    critic.requires_grad_(True)
    with (
        accelerator.accumulate(author),
        pytest.raises(ConfigError, match="whose own accumulation window is unfinished"),
    ):
        accelerator.backward(critic(author(torch.ones(1, 1))).sum())
