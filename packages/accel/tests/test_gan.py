"""Two models that train each other, each optimizer with windows of its own length, equal plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator, ConfigError, GradScalerKwargs
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

BATCH = 2
Trace = list[list[torch.Tensor]]
"""After each batch, the parameters of the discriminator and of the generator."""


def networks() -> tuple[nn.Module, nn.Module]:
    """A discriminator of pairs and a generator of them from noise."""
    torch.manual_seed(3)
    judge = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    maker = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return judge, maker


def optimizers(judge: nn.Module, maker: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return torch.optim.AdamW(judge.parameters(), lr=0.02), torch.optim.SGD(maker.parameters(), lr=0.1, momentum=0.9)


def data(num_rows: int) -> TensorDataset:
    """Real pairs, and noise."""
    generator = torch.Generator().manual_seed(8)
    real = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(real + 2, torch.randn(num_rows, 3, generator=generator, dtype=torch.float64))


def loss_of_judge(judge: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    verdicts: torch.Tensor = judge(torch.cat([real, fake]))
    return (softplus(-verdicts[: len(real)]) + softplus(verdicts[len(real) :])).mean()


def snapshot(*models: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


def train(num_batches: int, default: int, lengths: Sequence[int | None], alternate: bool) -> Trace:
    """On a rank: one epoch in windows of these lengths, both models on every batch or in turns."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=default)
    judge, maker = networks()
    loader = DataLoader(data(num_batches * BATCH * accelerator.num_processes), batch_size=BATCH)
    judge, maker, of_judge, of_maker, loader = accelerator.prepare(judge, maker, *optimizers(judge, maker), loader)
    trace = []
    for index, (real, noise) in enumerate(loader):
        if not alternate or index % 2 == 0:
            with accelerator.accumulate(judge, num_steps=lengths[0]):
                with torch.no_grad():
                    fake = maker(noise)
                accelerator.backward(loss_of_judge(judge, real, fake))
                of_judge.step()
                of_judge.zero_grad()
        if not alternate or index % 2 == 1:
            judge.requires_grad_(False)
            with accelerator.accumulate(maker, num_steps=lengths[1]):
                accelerator.backward(softplus(-accelerator.unwrap_model(judge)(maker(noise))).mean())
                of_maker.step()
                of_maker.zero_grad()
            judge.requires_grad_(True)
        trace.append(snapshot(judge, maker))
    return trace


def reference(num_batches: int, world: int, lengths: tuple[int, int], alternate: bool) -> Trace:
    """The same in plain torch, on the batches of all ranks."""
    judge, maker = networks()
    of_judge, of_maker = optimizers(judge, maker)
    columns = data(num_batches * BATCH * world).tensors
    held, trace = [0, 0], []
    for index in range(num_batches):
        real, noise = (column[index * BATCH * world : (index + 1) * BATCH * world] for column in columns)
        ends = index == num_batches - 1
        if not alternate or index % 2 == 0:
            held[0] += 1
            loss_of_judge(judge, real, maker(noise).detach()).backward()
            if held[0] == lengths[0] or ends:
                step(judge, of_judge, held[0])
                held[0] = 0
        if not alternate or index % 2 == 1:
            held[1] += 1
            gradients = torch.autograd.grad(softplus(-judge(maker(noise))).mean(), list(maker.parameters()))
            for parameter, gradient in zip(maker.parameters(), gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if held[1] == lengths[1] or ends:
                step(maker, of_maker, held[1])
                held[1] = 0
        trace.append(snapshot(judge, maker))
    return trace


def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad /= micro_batches
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("num_batches", "default", "lengths", "alternate"),
    [(7, 1, (3, None), False), (8, 3, (None, 1), False), (7, 2, (None, 3), False), (9, 1, (2, None), True)],
    ids=["the judge in threes", "the maker in ones", "both, differently", "in turns"],
)
def test_each_optimizer_has_windows_of_its_own_length(
    world: int, num_batches: int, default: int, lengths: tuple[int | None, int | None], alternate: bool
) -> None:
    both = (lengths[0] or default, lengths[1] or default)
    expected = reference(num_batches, world, both, alternate)
    arguments = (num_batches, default, lengths, alternate)
    for found in run_ranks(train, world, *arguments, settings=ProcessSettings(device="cpu")):
        for ours, theirs in zip(found, expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def pair(accelerator: Accelerator) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    models = networks()
    prepared: tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]
    prepared = accelerator.prepare(*models, *optimizers(*models))
    return prepared


def test_a_length_that_counts_nothing(alone: None) -> None:
    accelerator = Accelerator()
    judge, *_ = pair(accelerator)
    with pytest.raises(ConfigError, match=r"`num_steps=0` is not a number of micro-batches.*Give a positive integer"):
        accelerator.accumulate(judge, num_steps=0)


def test_a_window_keeps_the_length_that_it_began_with(alone: None) -> None:
    accelerator = Accelerator()
    judge, _, of_judge, _ = pair(accelerator)
    ends = []
    for num_steps in (3, 1, 7, 2, 2):
        with accelerator.accumulate(judge, num_steps=num_steps):
            accelerator.backward(judge(torch.ones(1, 2).double()).sum())
            ends.append(accelerator.sync_gradients)
            of_judge.step()
    assert ends == [False, False, True, False, True]


def test_a_backward_of_nobody_while_a_window_is_open(alone: None) -> None:
    accelerator = Accelerator()
    judge, maker, of_judge, of_maker = pair(accelerator)
    noise = torch.ones(1, 3).double()
    for _ in range(2):
        with accelerator.accumulate(judge, num_steps=2):
            accelerator.backward(judge(maker(noise).detach()).sum())
            of_judge.step()
            of_judge.zero_grad()
        if not accelerator.sync_gradients:
            with pytest.raises(ConfigError, match=r"outside `accumulate\(...\)` while an accumulation window is unfin"):
                accelerator.backward(judge(maker(noise)).sum())
    accelerator.backward(judge(maker(noise)).sum())  # between windows, it can belong to no other
    of_maker.step()


def test_a_loss_for_two_windows_of_other_lengths(alone: None) -> None:
    accelerator = Accelerator()
    judge, maker, *_ = pair(accelerator)
    with accelerator.accumulate(judge, num_steps=2):
        accelerator.backward(judge(torch.ones(1, 2).double()).sum())
    with accelerator.accumulate(), pytest.raises(ConfigError, match=r"divided by \[1, 2\] micro-batches"):
        accelerator.backward(judge(maker(torch.ones(1, 3).double())).sum())


@pytest.mark.parametrize("inside", [False, True])
def test_the_loss_scale_adapts_between_the_steps_of_two_optimizers(inside: bool, alone: None) -> None:
    scaling = GradScalerKwargs(init_scale=4.0, growth_interval=1)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[scaling])
    judge, maker, of_judge, of_maker = pair(accelerator)
    scales = []
    for factor in (1.0, float("inf"), 1.0):
        for model, optimizer, width, times in ((judge, of_judge, 2, 1.0), (maker, of_maker, 3, factor)):
            if inside:
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(1, width).double()).sum() * times)
                    optimizer.step()
            else:
                accelerator.backward(model(torch.ones(1, width).double()).sum() * times)
                optimizer.step()
            optimizer.zero_grad()
            scales.append(accelerator._engine.precision.scaler.state_dict()["scale"])
    # Each step but the first finds the scale that the one before it left.
    assert scales == [4.0, 8.0, 16.0, 32.0, 16.0, 32.0]
    assert (of_judge.steps_taken, of_maker.steps_taken) == (3, 2)  # type: ignore[attr-defined]
