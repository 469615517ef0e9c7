"""Local SGD: each rank steps on its own gradients, and every few steps the parameters are averaged instead.

Stich, "Local SGD Converges Fast and Communicates Little", arXiv:1805.09767, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from accel_parallel.sharded import is_sharded
from accel_parallel.strategy import Duty, Strategy
from accel_state.errors import ConfigError

__all__ = ["LocalSGD", "average_model"]

_AT_ONCE_BYTES = 64 * 2**20
"""Largest buffer in which tensors are exchanged together."""


class LocalSGD:
    """A block in which one model's gradients stay on each rank. Every rank must enter, step alike and leave::

        with LocalSGD(model=model, strategy=strategy, local_sgd_steps=8) as local_sgd:
            for batch in batches:
                ...  # forward, backward, optimizer.step(), optimizer.zero_grad()
                local_sgd.step()

    After every `local_sgd_steps` calls of `step`, and at the end of the block, parameters are averaged over the ranks,
    as `average_model` does. That is one exchange of the model in so many steps, instead of one of the gradients in
    each; in between, ranks drift apart, so the result is another one than that of averaged gradients, except with
    `local_sgd_steps` of 1 and plain SGD. In a world of one process it does nothing.

    The state of the optimizer, such as momentum, stays what each rank has; see `accel.LocalSGD` for the rest of a run.
    """

    def __init__(self, *, model: nn.Module, strategy: Strategy, local_sgd_steps: int, enabled: bool = True) -> None:
        """
        Args:
            model: what `strategy` prepared.
            strategy: how models are spread: one that gives each rank a whole copy.
            local_sgd_steps: optimizer steps from one average to the next.
            enabled: whether to do anything.

        Raises:
            ConfigError: for a model that is sharded, has nothing to train or steps in its backend.
        """
        if not isinstance(local_sgd_steps, int) or isinstance(local_sgd_steps, bool) or local_sgd_steps < 1:
            raise ConfigError(
                f"`local_sgd_steps={local_sgd_steps!r}` is not a number of steps after which parameters are averaged. "
                f"Give a positive integer."
            )
        self.model = model
        self.strategy = strategy
        self.local_sgd_steps = local_sgd_steps
        self.enabled = enabled and strategy.average_size > 1
        """Whether the block does anything: not where it was turned off, nor in a world of one."""
        self.steps_taken = 0
        """Calls of `step` in this block."""
        self._open = False
        self._exits = ExitStack()
        if self.enabled:
            _refuse_unfit(strategy, model)

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            if self._open:
                raise ConfigError(
                    "A `LocalSGD` block was entered while it is open. Make one `LocalSGD` for each block, and leave it "
                    "before the next."
                )
            self._exits.enter_context(self.strategy.no_sync(self.model))
        self.steps_taken, self._open = 0, True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open = False
        self._exits.close()
        # A rank that failed is not waited for; the others learn of it as of any rank that is gone.
        if self.enabled and error is None:
            self._average()

    def step(self) -> None:
        """Count one optimizer step; every rank must call this equally often. Averages when it is time."""
        if not self._open:
            raise ConfigError(
                "`LocalSGD.step()` was called outside its block, where gradients are averaged and there is nothing to "
                "count. Call it inside `with LocalSGD(...) as local_sgd:`, after each `optimizer.step()`."
            )
        self.steps_taken += 1
        if self.enabled and self.steps_taken % self.local_sgd_steps == 0:
            self._average()

    def _average(self) -> None:
        average_model(self.strategy.unwrap(self.model))


@torch.no_grad()
def average_model(model: nn.Module) -> None:
    """Every rank must call this. Trained parameters and buffers become the mean over all ranks, in place.

    Parameters of 16 bits are averaged in float32. Frozen ones, which are the same on all ranks, and buffers of
    integers, such as how many batches a normalization has seen, stay.

    Args:
        model: whole on every rank.
    """
    buffers = [each.data for each in model.buffers() if each.is_floating_point()]
    # Wider by one size, so that constants, which are the same on all ranks, come out to the bit.
    _average((parameter.data for parameter in model.parameters() if parameter.requires_grad), wider=False)
    _average(buffers, wider=True)


def _average(tensors: Iterable[torch.Tensor], *, wider: bool) -> None:
    for group in _groups(tensors):
        dtype = torch.promote_types(group[0].dtype, torch.float32)
        if wider and dtype is torch.float32 and group[0].device.type != "mps":  # which has no float64
            dtype = torch.float64
        flat = torch.cat([each.reshape(-1).to(dtype) for each in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        start = 0
        for each in group:
            each.copy_(flat[start : start + each.numel()].view_as(each))
            start += each.numel()


def _groups(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one device and dtype, in portions that are exchanged together; the same on every rank."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for members in kinds.values():
        portion: list[torch.Tensor] = []
        size = 0
        for each in members:
            if portion and size + each.nbytes > _AT_ONCE_BYTES:
                yield portion
                portion, size = [], 0
            portion.append(each)
            size += each.nbytes
        yield portion


def _refuse_unfit(strategy: Strategy, model: nn.Module) -> None:
    trained = [(name, each) for name, each in strategy.unwrap(model).named_parameters() if each.requires_grad]
    if not trained:
        raise ConfigError(
            f"`LocalSGD` was given a {type(model).__name__} without anything to train, so there is nothing to average. "
            f"Pass what `prepare` returned for a model that is trained."
        )
    sharded = [name for name, each in trained if is_sharded(each)]
    if sharded or strategy.average_size != dist.get_world_size():
        raise ConfigError(
            f"`LocalSGD` was given a {type(strategy.unwrap(model)).__name__} under the strategy `{strategy.name}`, "
            f"which divides {f'`{sharded[0]}`' if sharded else 'it'} over ranks: a rank that holds a part of a model "
            f"cannot step by itself. Use data parallel, where each rank has a whole copy, or leave `LocalSGD` out."
        )
    if strategy.owns & {Duty.AVERAGE, Duty.STEP}:
        raise ConfigError(
            f"`LocalSGD` was asked for under the strategy `{strategy.name}`, which exchanges gradients in a step of "
            f"its own, so they cannot stay local. Use data parallel, or leave `LocalSGD` out."
        )
