"""What training has to give: one process, plain torch, each window's gradient from the whole window at once.

Nothing of ours is used, so that it cannot be wrong in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from accel_parallel.testing.scenarios import Scenario, batch, build, loss_of, taking_part

__all__ = ["MAX_NORM", "Step", "Trace", "reference_trace"]

MAX_NORM = 0.4
"""Small enough that most steps are clipped."""

_MicroBatch = tuple[int, int]
"""Epoch and index."""


@dataclass(slots=True)
class Step:
    """One optimizer step of one model."""

    gradients: dict[str, torch.Tensor]
    """By parameter name, before clipping."""
    norm: float
    """Their norm, before clipping."""
    lr: float
    skipped: bool


@dataclass(slots=True)
class Trace:
    """What a run leaves."""

    losses: dict[tuple[int, int, int], float] = field(default_factory=dict)
    """This rank's loss, or the sum of it, by epoch, index and model."""
    steps: list[list[Step]] = field(default_factory=list)
    """For each model, its steps."""
    parameters: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """For each model, its state at the end."""


def reference_trace(scenario: Scenario, *, world_size: int, dtype: torch.dtype) -> list[Trace]:
    """What each rank of a world of this size has to see."""
    models, optimizers = build(scenario.num_models, dtype)
    schedulers = [StepLR(optimizer, step_size=4, gamma=0.5) for optimizer in optimizers]
    traces = [Trace(steps=[[] for _ in models]) for _ in range(world_size)]
    for ends, index, window in _windows(scenario):
        model, optimizer = models[index], optimizers[index]
        optimizer.zero_grad()
        gradients = _window_gradients(scenario, model, window, traces, index)
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        skipped = ends in scenario.poisoned
        for trace in traces:
            trace.steps[index].append(Step(gradients, norm.item(), optimizer.param_groups[0]["lr"], skipped))
        if not skipped:
            optimizer.step()
            schedulers[index].step()
    for trace in traces:
        trace.parameters = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    return traces


def _windows(scenario: Scenario) -> list[tuple[int, int, list[_MicroBatch]]]:
    """For each step in order of time: its number, its model, its micro-batches."""
    found: list[tuple[_MicroBatch, int, list[_MicroBatch]]] = []
    for model in range(scenario.num_models):
        for epoch in range(scenario.num_epochs):
            own = [(epoch, i) for i in range(scenario.epoch_length) if model in taking_part(scenario, i)]
            parts = [own[at : at + scenario.num_steps] for at in range(0, len(own), scenario.num_steps)]
            found += [(part[-1], model, part) for part in parts]
    counts = [0] * scenario.num_models
    numbered = []
    for _, model, part in sorted(found):
        numbered.append((counts[model], model, part))
        counts[model] += 1
    return numbered


def _window_gradients(
    scenario: Scenario, model: nn.Module, window: list[_MicroBatch], traces: list[Trace], index: int
) -> dict[str, torch.Tensor]:
    losses, total_items = [], 0
    for epoch, number in window:
        for rank, trace in enumerate(traces):
            tokens, targets, num_items = batch(epoch, number, rank)
            loss = loss_of(model(tokens), targets, num_items if scenario.by_items else None)
            trace.losses[epoch, number, index] = loss.item()
            losses.append(loss)
            total_items += num_items
    divisor = max(1, total_items) if scenario.by_items else len(losses)
    (torch.stack(losses).sum() / divisor).backward()  # type: ignore[no-untyped-call, unused-ignore]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
