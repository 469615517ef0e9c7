"""What is trained in a contract: small models, their data on every rank, and which backward passes make a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

__all__ = ["SCENARIOS", "ContractModel", "Scenario", "batch", "build", "loss_of", "taking_part"]

_TOKENS = 11
_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One way of accumulating."""

    name: str
    num_steps: int = 3
    """Micro-batches in a window."""
    by_items: bool = False
    """Whether the loss is a sum over items that vary by rank and micro-batch, or a mean."""
    known: bool = True
    """Whether the number of micro-batches that remain is told at each, or only that the last one is the last."""
    sync_each_batch: bool = False
    num_models: int = 1
    """With two, each has an optimizer of its own."""
    apart: bool = False
    """Whether the second model takes part in every second micro-batch only, so that windows end at different times."""
    num_epochs: int = 4
    epoch_length: int = 7
    """Micro-batches an epoch; 7 makes windows of 3, 3 and 1, and 8 of 3, 3 and 2, whose end may come unannounced."""
    poisoned: frozenset[int] = frozenset()
    """Steps, counted from 0, whose gradients are not finite: a loss scaler skips them."""


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(name="mean, no accumulation", num_steps=1, epoch_length=5, num_epochs=2),
    Scenario(name="mean"),
    Scenario(name="mean, end unknown", known=False, epoch_length=8),
    Scenario(name="mean, exchanged each time", sync_each_batch=True),
    Scenario(name="items, no accumulation", num_steps=1, epoch_length=5, num_epochs=2, by_items=True),
    Scenario(name="items", by_items=True),
    Scenario(name="items, end unknown", by_items=True, known=False, epoch_length=8),
    Scenario(name="items, exchanged each time", by_items=True, sync_each_batch=True),
    Scenario(name="mean, two models", num_models=2, epoch_length=8),
    Scenario(name="items, two models", by_items=True, num_models=2, known=False),
    Scenario(name="mean, two models apart", num_models=2, apart=True, epoch_length=9),
    Scenario(name="items, two models apart", by_items=True, num_models=2, apart=True, epoch_length=9),
    Scenario(name="mean, skipped", poisoned=frozenset({2, 5})),
    Scenario(name="items, skipped", by_items=True, poisoned=frozenset({0, 3})),
)
"""At least ten optimizer steps each."""


class ContractModel(nn.Module):
    """Tokens to logits: an output tied to the embedding, a frozen part, a persistent buffer.

    Args:
        width: of the hidden layer.
        deep: whether there is one more layer.
    """

    def __init__(self, *, width: int = 6, deep: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(_TOKENS, width)
        self.body = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.deeper = nn.Linear(width, width) if deep else None
        self.head = nn.Linear(width, _TOKENS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.linspace(-1, 1, width))
        self.offset: torch.Tensor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of shape (length, tokens) for tokens of shape (length,)."""
        hidden = torch.tanh(self.frozen(self.body(self.embed(tokens)))) + self.offset
        if self.deeper is not None:
            hidden = self.deeper(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def build(
    num_models: int, dtype: torch.dtype, *, seed: int = 0, width: int = 6, deep: bool = False
) -> tuple[list[nn.Module], list[Optimizer]]:
    """Models and an optimizer of each, the same on every rank."""
    models: list[nn.Module] = []
    optimizers: list[Optimizer] = []
    for index in range(num_models):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            model = ContractModel(width=width, deep=deep).to(dtype)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        models.append(model)
        optimizers.append(AdamW(trained, lr=0.02 * (index + 1), weight_decay=0.1))
    return models, optimizers


def batch(epoch: int, index: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens and targets of shape (length,) of one rank's micro-batch, and how many of them count as items: 0 to 8."""
    generator = torch.Generator().manual_seed(10_000 * epoch + 100 * index + rank)
    tokens = torch.randint(_TOKENS, (2, _LENGTH), generator=generator)
    num_items = (0, 8, 3, 1, 5)[(2 * rank + index + epoch) % 5]
    return tokens[0], tokens[1], num_items


def loss_of(logits: torch.Tensor, targets: torch.Tensor, num_items: int | None) -> torch.Tensor:
    """The mean over all targets, or the sum over the first `num_items`."""
    each = nn.functional.cross_entropy(logits, targets, reduction="none")
    return each.mean() if num_items is None else (each * (torch.arange(len(each)) < num_items)).sum()


def taking_part(scenario: Scenario, index: int) -> Sequence[int]:
    """The models that take part in the micro-batch of this number in its epoch."""
    if not scenario.apart:
        return range(scenario.num_models)
    return (0, 1) if index % 2 == 0 else (0,)
