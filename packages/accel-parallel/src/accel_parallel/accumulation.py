"""Accumulation windows: which backward passes make one optimizer step, and what their gradients are divided by.

The gradient at a step equals that of one process on the whole window, whatever the number of processes,
micro-batches, or items in each (invariant 2):

* ``scale_loss(loss)`` takes each micro-batch as one: the window's gradient is the mean over the micro-batches that
  it really held. Where the last window of an epoch is known to be shorter, its losses are divided by the shorter
  length at once; where that shows only at its end, the gradients are corrected then.
* ``scale_loss(loss_sum, num_items)`` takes each item (a token, a sample) as one. Let :math:`L_{rm}` be the sum over the
  :math:`n_{rm}` items of rank *r*, micro-batch *m*; wanted is :math:`\\nabla \\sum L_{rm} / \\sum n_{rm}`. The
  denominator is known when the window ends, so each loss is first multiplied by ``ranks / reference``, with a
  reference that all ranks share (about the items of the window before), to stay within the range of float16; averaging
  over the ranks in backward divides by ``ranks`` again; and at the end gradients are multiplied by
  ``reference / total``. The reference is a power of two, so that it changes no digit of a gradient: a run resumed with
  another one gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch

from accel_parallel.plugins import GradientAccumulationPlugin, check_num_steps
from accel_parallel.strategy import Strategy
from accel_state.errors import ConfigError

__all__ = ["Accumulation", "Window"]


class Window:
    """The micro-batches between two steps of one optimizer. Its gradients are those of `parameters`."""

    __slots__ = (
        "_items",
        "_kind",
        "_reference",
        "divisor",
        "fresh",
        "holds",
        "length",
        "local",
        "micro_steps",
        "parameters",
        "pending",
        "sync",
    )

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        self.parameters = tuple(parameters)
        self.micro_steps = 0
        """Micro-batches begun in this window, the current one included; 0 before the first."""
        self.length = 1
        """Micro-batches after which it ends, if the epoch does not end before."""
        self.local = False
        """Whether each rank steps on its own gradients for now, which nobody averages."""
        self.sync = True
        """Whether the current micro-batch ends the window: gradients are exchanged and the optimizer steps."""
        self.pending = False
        """Whether gradients of this window wait for a step."""
        self.fresh = False
        """Whether the current micro-batch has been through backward."""
        self.holds = False
        """Whether any micro-batch of this window has. Older gradients, of a window that nobody stepped, may go."""
        self.divisor = 1
        """What the mean over micro-batches divides each loss by."""
        self._kind: Literal["micro-batches", "items"] | None = None
        self._items: torch.Tensor | None = None
        self._reference: torch.Tensor | None = None

    @property
    def accumulating(self) -> bool:
        """Whether gradients of earlier micro-batches of this window must outlive a ``zero_grad()``."""
        return self.pending and self.holds and not (self.sync and self.fresh)

    @property
    def unfinished(self) -> int:
        """Micro-batches whose gradients wait for a step; a resumed run has to see them again."""
        return self.micro_steps if self.pending else 0

    def place(self) -> dict[str, Any]:
        """How far this window is, for `move_to` on another rank. The gradients are not part of it."""
        return {name: getattr(self, name) for name in _PLACE}

    def move_to(self, place: Mapping[str, Any]) -> None:
        """Stand where another rank's window stands. Items are not counted over ranks then: there must be none."""
        assert not self.counts_items
        for name in _PLACE:
            setattr(self, name, place[name])

    def begin(self, *, num_steps: int, remaining: int | None) -> None:
        """A micro-batch begins, after which the epoch has `remaining` more (``None``: not known, or no epoch).

        A new window is to hold `num_steps`; one that is not finished keeps the length that it began with.
        """
        if self.sync:
            self.micro_steps, self._kind, self._items, self._reference = 0, None, None, None
            self.holds = False
            self.length = num_steps
            self.divisor = num_steps if remaining is None else min(num_steps, remaining + 1)
        self.micro_steps += 1
        self.sync = self.micro_steps >= self.length or remaining == 0
        self.fresh = False

    def restart(self) -> None:
        """Forget a window that is not finished, and with it what its gradients stood for."""
        self.micro_steps, self.sync, self.pending, self.fresh, self.holds = 0, True, False, False, False
        self._kind, self._items, self._reference = None, None, None

    def taken(self) -> None:
        """The optimizer stepped, or its step was skipped: the window's gradients are spent."""
        self.pending = False

    def use(self, kind: Literal["micro-batches", "items"]) -> None:
        """Note how this window is divided; one window is divided one way."""
        if self._kind is not None and self._kind != kind and self.holds:
            raise ConfigError(
                f"`backward` was called {'with' if kind == 'items' else 'without'} `num_items` in an accumulation "
                f"window that began {'without' if kind == 'items' else 'with'} it, so its gradients have no common "
                f"unit. Pass `num_items` with every micro-batch of a window, or with none."
            )
        self._kind = kind

    def correct_mean(self, strategy: Strategy) -> None:
        """At the end: the window held fewer micro-batches than its losses were divided by."""
        if self._kind == "micro-batches" and self.divisor != self.micro_steps:
            strategy.scale_gradients_(self.parameters, self.divisor / self.micro_steps)
            self.divisor = self.micro_steps  # another loss of this same micro-batch is divided rightly at once

    def add_items(self, num_items: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Count the items of one micro-batch. Returns what its loss is divided by: `reference` if the window is new."""
        if self.fresh:
            raise ConfigError(
                "`backward(loss, num_items=...)` was called twice for one micro-batch of an accumulation window, and "
                "its items would be counted twice. Add the losses up and call it once."
            )
        if self._items is None or self._reference is None:
            self._items, self._reference = num_items, reference
        else:
            self._items = self._items + num_items
        return self._reference

    def correct_items(self, strategy: Strategy) -> torch.Tensor:
        """At the end: divide by what the window held over all ranks, and return that. Every rank must call this."""
        assert self._items is not None
        assert self._reference is not None
        total = _at_least_one(self._items if self.local else strategy.sum_over_data(self._items))
        strategy.scale_gradients_(self.parameters, self._reference / total)
        self._items = self._reference = None
        return total

    @property
    def counts_items(self) -> bool:
        """Whether gradients of this window still have to be divided by its items."""
        return self._items is not None


_PLACE = ("micro_steps", "length", "sync", "pending", "fresh", "holds", "divisor", "_kind")


class Accumulation:
    """All windows of a run. Owned by the `Accelerator`, which tells it of every micro-batch and every backward."""

    def __init__(self, plugin: GradientAccumulationPlugin, strategy: Strategy) -> None:
        self.plugin = plugin
        self.strategy = strategy
        self.num_steps = plugin.num_steps
        self._windows: list[Window] = []
        self._unbound = Window()
        self._active: tuple[Window, ...] = (self._unbound,)
        self._everything: tuple[Window, ...] = self._active
        self._inside = False
        self._counted = False
        """Whether windows of another length than `num_steps` have been asked for."""
        self._others: list[tuple[torch.Tensor, torch.Tensor | None, int]] = []
        """Parameters of unfinished windows that the current backward must leave alone, and their gradients before."""
        self._reference: torch.Tensor | None = None
        """About the items of the window that ended last, over all ranks: the scale of the next one's losses."""

    @property
    def is_trivial(self) -> bool:
        """Whether a loss now is a window of its own, which needs neither scaling nor remembering."""
        return self.num_steps == 1 and not self._inside and not self._counted

    def bind(self, parameters: Iterable[torch.Tensor]) -> Window:
        """A window for an optimizer of these parameters."""
        window = Window(parameters)
        self._windows.append(window)
        self._everything = self._active = tuple(self._windows)
        return window

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch ends its window (all of its windows, where there are several)."""
        return all(window.sync for window in self._active)

    @property
    def between_windows(self) -> bool:
        """Whether no gradient of any window waits for a step, so that the loss scale may change."""
        return not any(window.pending for window in self._everything)

    @property
    def windows(self) -> tuple[Window, ...]:
        """One an optimizer; a single one that is nobody's where there is none."""
        return self._everything

    @property
    def unfinished(self) -> int:
        """Most micro-batches of a window that a run resumed from now would have to repeat."""
        return max(window.unfinished for window in self._everything)

    def restart(self) -> None:
        """Forget all windows that are not finished. Called when another state was restored."""
        for window in self._everything:
            window.restart()

    def windows_of(self, parameters: Iterable[torch.Tensor]) -> tuple[Window, ...]:
        """The windows that own any of these parameters; all of them where none does."""
        wanted = {id(parameter) for parameter in parameters}
        found = tuple(w for w in self._windows if any(id(p) in wanted for p in w.parameters))
        return found or self._everything

    def enter(self, windows: Sequence[Window] | None, remaining: int | None, num_steps: int | None = None) -> Scope:
        """A micro-batch of these windows (all: ``None``) begins; ``with`` its result around forward, backward, step.

        Args:
            windows: those that the micro-batch counts in.
            remaining: micro-batches that follow in the epoch, where that is known.
            num_steps: micro-batches in these windows, if others than in the rest.

        Raises:
            ConfigError: if `num_steps` is no number of micro-batches.
        """
        if num_steps is None:
            num_steps = self.num_steps
        elif num_steps != self.num_steps:
            check_num_steps(num_steps)
            self._counted = True
        if not self.plugin.sync_with_dataloader:
            remaining = None
        active = self._everything if windows is None else tuple(windows)
        for window in active:
            window.begin(num_steps=num_steps, remaining=remaining)
        return Scope(self, active)

    def scale_loss(self, loss: torch.Tensor, num_items: int | float | torch.Tensor | None = None) -> torch.Tensor:
        """What backward is to be run on, so that the window's gradient comes out exact.

        Args:
            loss: a scalar. Without `num_items` the mean over this rank's micro-batch; with it the sum over its items.
            num_items: items that `loss` sums over on this rank, a number or a scalar tensor.

        Raises:
            ConfigError: if one window mixes both forms, or `num_items` is no count (a negative one on an accelerator
                is not seen) or comes without `accumulate` although a window has several micro-batches.
        """
        if self._inside:
            for window in self._active:
                window.use("micro-batches" if num_items is None else "items")
            if len(self._active) < len(self._everything):
                self._watch_others()
        if num_items is not None:
            return self._by_items(loss, _as_count(num_items, loss))
        if not self._inside:
            if self._counted:
                self._refuse_outside()
            # The script counts by itself: the familiar meaning divides by the length it announced.
            return loss if self.num_steps == 1 else loss / self.num_steps
        divisor = self._common_divisor()
        return loss if divisor == 1 else loss / divisor

    def after_backward(self) -> None:
        """Backward ran. Where it ended a window, its gradients get their final scale now.

        Raises:
            ConfigError: if it reached into the unfinished window of another model.
        """
        if self._others:
            self._refuse_pollution()
        for window in self._reached():
            window.pending = window.fresh = window.holds = True
            if window.sync and self._inside:
                if window.counts_items:
                    total = window.correct_items(self.strategy)
                    if not window.local:  # what one rank held is no reference for all
                        self._reference = _power_of_two(total)
                else:
                    window.correct_mean(self.strategy)

    def _reached(self) -> Sequence[Window]:
        """The windows whose gradients the current backward added to."""
        if self._inside or len(self._everything) == 1:
            return self._active
        return [window for window in self._everything if any(p.grad is not None for p in window.parameters)]

    def _watch_others(self) -> None:
        """Remember the gradients of unfinished windows that this backward is not for."""
        others = [window for window in self._everything if window not in self._active and window.accumulating]
        self._others = [(p, p.grad, _version(p.grad)) for window in others for p in window.parameters]

    def _refuse_pollution(self) -> None:
        others, self._others = self._others, []
        for parameter, gradient, version in others:
            if parameter.grad is not gradient or _version(parameter.grad) != version:
                raise ConfigError(
                    f"This backward, inside `accumulate` of one model, also added to the gradient of a parameter of "
                    f"shape {tuple(parameter.shape)} whose own accumulation window is unfinished, so that one would "
                    f"step on a foreign loss. Freeze the other model around it with `requires_grad_(False)` (under "
                    f"several processes call it as `accelerator.unwrap_model(model)` then), or train both in one "
                    f"`accumulate(...)`."
                )

    def _refuse_outside(self) -> None:
        """A backward that belongs to no window would be added to those that are not finished, and stepped with them."""
        if any(window.accumulating for window in self._everything):
            raise ConfigError(
                "`backward` was called outside `accumulate(...)` while an accumulation window is unfinished, so it is "
                "not known whether its gradients belong to that one. Put every micro-batch inside "
                "`with accelerator.accumulate(model):`, that of a model with windows of one as well."
            )

    def _common_divisor(self) -> int:
        if len(self._active) == 1:
            return self._active[0].divisor
        divisors = {window.divisor for window in self._active}
        if len(divisors) > 1:
            raise ConfigError(
                f"This backward reaches optimizers whose windows are divided by {sorted(divisors)} micro-batches, "
                "and one "
                f"loss has one divisor. Call `accumulate(model)` for each model, with a `backward` of its own inside."
            )
        return divisors.pop()

    def _by_items(self, loss: torch.Tensor, num_items: torch.Tensor) -> torch.Tensor:
        if not self._inside and self.num_steps > 1:
            raise ConfigError(
                f"`backward(loss, num_items=...)` was called outside `accumulate(...)` with "
                f"`gradient_accumulation_steps={self.num_steps}`, so where the window ends is not known. "
                f"Put the micro-batch inside `with accelerator.accumulate(model):`."
            )
        local = self._is_local()
        ranks = 1 if local else self.strategy.average_size
        if all(window.sync and window.micro_steps <= 1 and window.divisor == 1 for window in self._active):
            # A window of one micro-batch: its total is known before backward, and no gradient needs correcting.
            total = num_items if local else self.strategy.sum_over_data(num_items)
            return loss * (ranks / _at_least_one(total))
        if local:
            reference = _power_of_two(_at_least_one(num_items))
        else:
            if self._reference is None:
                self._reference = _power_of_two(_at_least_one(self.strategy.sum_over_data(num_items)))
            reference = self._reference
        references = [window.add_items(num_items, reference) for window in self._active]
        if any(reference is not references[0] for reference in references):
            raise ConfigError(
                f"This backward reaches {len(references)} optimizers whose windows began at different micro-batches, "
                "and "
                f"one loss has one scale. Call `accumulate(model)` for each model, with a `backward` of its own inside."
            )
        return loss * (ranks / references[0])

    def _is_local(self) -> bool:
        """Whether the current windows count only what this rank holds."""
        local = {window.local for window in self._active}
        if len(local) > 1:
            raise ConfigError(
                "`backward(loss, num_items=...)` was called for a model inside `LocalSGD`, whose gradients stay on "
                "each rank, and for one outside, whose gradients are averaged, and one loss has one scale. Call "
                "`accumulate(model)` for each of them, with a `backward` of its own inside."
            )
        return local.pop()


class Scope:
    """One micro-batch: while it is open, its windows are the ones that backward belongs to."""

    __slots__ = ("_accumulation", "_before", "_inside", "windows")

    def __init__(self, accumulation: Accumulation, windows: tuple[Window, ...]) -> None:
        self._accumulation = accumulation
        self.windows = windows

    def __enter__(self) -> None:
        accumulation = self._accumulation
        self._before, self._inside = accumulation._active, accumulation._inside
        accumulation._active, accumulation._inside = self.windows, True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        accumulation = self._accumulation
        accumulation._inside = self._inside
        if self._inside:
            accumulation._active = self._before


def _as_count(num_items: int | float | torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    if isinstance(num_items, torch.Tensor):
        # A count on an accelerator is believed: looking at it would wait for the device in every step.
        seen = num_items.device.type == "cpu" and num_items.dim() == 0
        known: int | float = num_items.item() if seen else 0
        count = num_items.detach().to(device=loss.device)
    elif isinstance(num_items, (int, float)):
        known = num_items
        count = torch.tensor(num_items, device=loss.device)
    else:
        raise ConfigError(
            f"`num_items` is a {type(num_items).__name__}, but one loss has one count. Pass a number or a scalar "
            f"tensor, such as `(labels != -100).sum()`."
        )
    if not 0 <= known < math.inf:
        raise ConfigError(
            f"`num_items={known}` is no count: a loss sums over zero items or more. "
            f"Pass how many items (tokens, samples) the loss is the sum of on this process."
        )
    if count.dim() != 0:
        raise ConfigError(
            f"`num_items` has shape {tuple(count.shape)}, but one loss has one count. Pass a number or a scalar "
            "tensor, "
            f"such as `(labels != -100).sum()`."
        )
    # float64 counts exactly up to 2**53 items; a device without it counts up to 2**24.
    return count.to(torch.float32 if loss.device.type == "mps" else torch.float64)


def _version(gradient: torch.Tensor | None) -> int:
    """Counts the changes in place."""
    return -1 if gradient is None else gradient._version


def _at_least_one(total: torch.Tensor) -> torch.Tensor:
    """A window without any item has gradients of zero, not of 0 / 0."""
    return torch.where(total > 0, total, torch.ones_like(total))


def _power_of_two(total: torch.Tensor) -> torch.Tensor:
    """The least power of two above a positive number."""
    _, exponent = torch.frexp(total)
    return torch.ldexp(torch.ones_like(total), exponent)
