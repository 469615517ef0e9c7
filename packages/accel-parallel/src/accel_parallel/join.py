"""Ranks that run out of batches at different times: those that are through stand in for what DDP exchanges.

torch's ``Join`` does that for the collectives of DDP's forward and backward and for nothing else. It counts on each
rank calling forward, then backward, model after model, and waits for ever where that is not so: `Turns` refuses it
instead. It also leaves its mark on the models (a collective in each later forward, a divisor that is that of the last
step), which is taken off again here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from accel_state.errors import ConfigError
from accel_state.tree import tensor_leaves

__all__ = ["joined"]


@contextmanager
def joined(models: Sequence[DistributedDataParallel], settle: Callable[[int], None] | None) -> Iterator[None]:
    """Every rank must enter. Gradients are averaged over the ranks that have not left the block yet.

    Args:
        models: what the block trains.
        settle: called on every rank when all of them are through, with the rank that took the most steps, after its
            parameters and buffers were sent to all.

    Raises:
        ConfigError: inside, for an order of forward and backward passes for which nobody could stand in.
    """
    last = _Last(models[0])
    configs = [model._join_config for model in models]
    # A collective that is done, for later: it takes the place of the block's last one, which names a divisor.
    whole = dist.all_reduce(torch.ones(1, device=models[0].device), group=models[0].process_group, async_op=True)
    assert whole is not None
    whole.wait()
    try:
        later = [each for model in models[1:] for each in (_Count(model), model)]
        join = Join([models[0], *later, last], divide_by_initial_world_size=False)
        with Turns(models) as turns, _AtExit(join):
            yield
            turns.check_left()
    finally:
        for model, config in zip(models, configs, strict=True):
            model._join_config = config
            model.reducer._set_forward_pass_work_handle(whole, True)
    if settle is not None:
        settle(last.agree())


class Turns:
    """Refuses passes in another order than forward and backward of one model after the other."""

    def __init__(self, models: Sequence[DistributedDataParallel]) -> None:
        self._models = tuple(models)
        self._turn = 0
        """The model whose forward or backward is next."""
        self._waiting = False
        """Whether it has been through forward, and backward is next."""

    def __enter__(self) -> Turns:
        self._hooks = [each for index, model in enumerate(self._models) for each in self._watch(index, model)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def check_left(self) -> None:
        """A rank leaves: the others must not wait for half of a turn."""
        if self._waiting or self._turn:
            raise ConfigError(
                f"A rank left the block for uneven inputs after {'the forward' if self._waiting else 'its pass'} of "
                f"model number {self._turn if self._waiting else self._turn - 1}, before all {len(self._models)} "
                f"model(s) were through forward and backward, and no other rank can finish that. Leave the block "
                f"between micro-batches."
            )

    def _watch(self, index: int, model: DistributedDataParallel) -> Iterator[Any]:
        yield model.register_forward_pre_hook(lambda *_: self._forward(index))
        yield model.register_forward_hook(lambda _module, _inputs, output: self._expect_backward(output))

    def _forward(self, index: int) -> None:
        if not torch.is_grad_enabled():
            raise ConfigError(
                "A model was called without gradients inside the block for uneven inputs, and ranks that are through "
                "would stand in for a backward that never comes. Evaluate outside the block, or call the model "
                "that `unwrap_model` gives."
            )
        if self._waiting or index != self._turn:
            happened = "before the backward of the last call" if self._waiting else "out of turn"
            raise ConfigError(
                f"Model number {index} was called {happened} inside the block for uneven inputs, where ranks that are "
                f"through stand in for one forward and one backward of each of {len(self._models)} model(s), in the "
                f"order given. Make one forward of all inputs, or train with even batches."
            )
        if index:
            _count(self._models[index])

    def _expect_backward(self, output: Any) -> None:
        self._waiting = True
        for tensor in tensor_leaves(output):
            if tensor.requires_grad:
                tensor.register_hook(self._backward)  # type: ignore[no-untyped-call, unused-ignore]

    def _backward(self, gradient: torch.Tensor) -> None:
        if self._waiting:
            self._waiting = False
            self._turn = (self._turn + 1) % len(self._models)


def _count(model: DistributedDataParallel) -> None:
    """Let gradients be divided by the ranks that are there. DDP does that for the first model of a ``Join`` only."""
    work = dist.all_reduce(torch.ones(1, device=model.device), group=model.process_group, async_op=True)
    model.reducer._set_forward_pass_work_handle(work, False)


class _Silent(Joinable):
    """Follows a model in a ``Join`` without being one."""

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__()
        self._model = model

    @property
    def join_device(self) -> torch.device:
        device: torch.device = self._model.join_device
        return device

    @property
    def join_process_group(self) -> Any:
        return self._model.join_process_group


class _Count(_Silent):
    """Stands in for `_count`."""

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Absent(self)


class _Absent(JoinHook):
    def __init__(self, of: _Silent) -> None:
        self._of = of

    def main_hook(self) -> None:
        dist.all_reduce(torch.zeros(1, device=self._of.join_device), group=self._of.join_process_group)


class _Last(_Silent):
    """Exchanges nothing while the block runs, and learns whether this rank was among the last to leave it."""

    was_last = False

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Note(self)

    def agree(self) -> int:
        """The highest of the ranks that left last. Every rank must call this."""
        rank = dist.get_rank(self.join_process_group) if self.was_last else -1
        found = torch.tensor(rank, device=self.join_device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.join_process_group)
        return int(found.item())


class _Note(JoinHook):
    def __init__(self, last: _Last) -> None:
        self._last = last

    def post_hook(self, is_last_joiner: bool) -> None:
        self._last.was_last = is_last_joiner


class _AtExit:
    """``Join`` that keeps the filters of warnings, which its end would change for the whole process."""

    def __init__(self, join: Join) -> None:
        self._join = join

    def __enter__(self) -> None:
        self._join.__enter__()  # type: ignore[no-untyped-call, unused-ignore]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with warnings.catch_warnings():
            self._join.__exit__(kind, error, traceback)
