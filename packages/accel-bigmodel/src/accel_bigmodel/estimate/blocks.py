"""What happens at the borders of a model's blocks in a traced run: checkpointing, and what ranks share of them.

Sharding follows torch's `fully_shard` of each block and of the root around them: before a block runs, forwards or
backwards, its parameters are gathered, and those of the next one ahead of time; the root stays gathered from its
forward to the end of backward. Gradients of a block are whole until all are there, then they are reduced through one
flat buffer, which is kept until the next block's (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). ZeRO's
third stage (Rajbhandari et al., arXiv:1910.02054) is taken to do the same, its second one the gradients only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from accel_bigmodel.estimate.tracker import AllocationTracker
from accel_state.blocks import find_blocks, outermost

__all__ = ["Blocks", "checkpoint_blocks"]

ROOT = -1
"""Index of the unit that holds what is in no block."""


def checkpoint_blocks(model: nn.Module, *, again: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
    """Let each block of `model` keep its inputs only and run again in backward; how many there are.

    Args:
        model: changed.
        again: makes what is entered while a block runs again. Backward leaves the modes in which torch's functions are
            replaced, as it is one of them.
    """
    blocks = outermost(find_blocks(model))
    for _, block in blocks:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), again()),
        )
    return len(blocks)


class Blocks:
    """Tells a tracker which block runs, and counts what `ranks` gather and reduce at its borders.

    Args:
        model: a fake one, of which hooks stay.
        tracker: told.
        gathers: whether parameters are divided.
        reduces: whether gradients are.
        ranks: between how many.
    """

    def __init__(
        self, model: nn.Module, tracker: AllocationTracker, *, gathers: bool, reduces: bool, ranks: int
    ) -> None:
        found = outermost(find_blocks(model))
        self._tracker = tracker
        self._names = [name for name, _ in found]
        self._gathers = gathers
        self._reduces = reduces
        self._ahead = ranks > 1
        self._gathered = 0
        self._root_running = False
        self._buffered = 0
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        self._units = self._divide(model, found)
        self._sizes = {unit: _bytes(members) for unit, members in self._units.items()}
        self._waiting: dict[int, set[nn.Parameter]] = {}
        model.register_forward_pre_hook(lambda *_: self._enter_root())
        for index, (_, block) in enumerate(found):
            block.register_forward_pre_hook(partial(self._enter, index))
            block.register_forward_hook(partial(self._leave, index))
        for unit, members in self._units.items():
            for parameter in members:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(self._accumulated, unit))  # type: ignore[no-untyped-call]

    def begin_backward(self) -> None:
        """The loss is there."""
        self._tracker.moment = "backward"
        self._waiting = {
            unit: {each for each in members if each.requires_grad} for unit, members in self._units.items()
        }

    def end_backward(self) -> None:
        """All gradients are there: nothing is gathered any more."""
        self._root_running = False
        self._gather()
        self._buffer(0)

    def give_gradients(self) -> None:
        """Put the reduced gradients where an optimizer finds them."""
        for parameter, gradient in self._kept.items():
            parameter.grad = gradient
        self._kept.clear()

    @staticmethod
    def _divide(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> dict[int, list[nn.Parameter]]:
        """Parameters of each unit. One that several share belongs to the root, as it does when they are sharded."""
        homes: dict[nn.Parameter, set[int]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            inside = (index for index, (block, _) in enumerate(blocks) if name.startswith(f"{block}."))
            homes.setdefault(parameter, set()).add(next(inside, ROOT))
        units: dict[int, list[nn.Parameter]] = {ROOT: [], **{index: [] for index in range(len(blocks))}}
        for parameter, found in homes.items():
            units[found.pop() if len(found) == 1 else ROOT].append(parameter)
        return units

    def _enter_root(self) -> None:
        self._root_running = True
        self._gather()

    def _enter(self, index: int, *_: Any) -> None:
        self._tracker.moment = f"forward of {self._names[index]}"
        self._gather(index, index + 1)

    def _leave(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._tracker.moment = "forward"
        self._gather(index + 1)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._enter_backward, index))  # type: ignore[no-untyped-call]
                break

    def _enter_backward(self, index: int, gradient: torch.Tensor) -> None:
        self._tracker.moment = f"backward of {self._names[index]}"
        self._gather(index, index - 1)

    def _accumulated(self, unit: int, parameter: nn.Parameter) -> None:
        if not self._reduces:
            self._tracker.register("gradients", [parameter.grad])
            return
        self._tracker.register("gradients before reduction", [parameter.grad])
        waiting = self._waiting[unit]
        waiting.discard(parameter)
        if waiting:
            return
        trained = [each for each in self._units[unit] if each.requires_grad]
        self._buffer(_bytes(trained))
        for each in trained:
            if each not in self._kept and each.grad is not None:
                self._kept[each] = each.grad
                self._tracker.register("gradients", [each.grad])
            each.grad = None
        if unit != ROOT:
            self._gather(unit - 1)

    def _gather(self, *units: int) -> None:
        """These units, the next one after the current one only if there are others to gather it from, and the root."""
        if not self._gathers:
            return
        wanted = [each for each in units[: None if self._ahead else 1] if each in self._sizes and each != ROOT]
        size = sum(self._sizes[each] for each in wanted) + (self._sizes[ROOT] if self._root_running else 0)
        self._tracker.add("gathered weights", size - self._gathered)
        self._gathered = size

    def _buffer(self, size: int) -> None:
        """Reduce through a buffer of `size`, while the one before is still there."""
        if size and self._ahead:
            self._tracker.add("reduction buffers", size)
            self._tracker.add("reduction buffers", -self._buffered)
            self._buffered = size
        elif self._buffered:
            self._tracker.add("reduction buffers", -self._buffered)
            self._buffered = 0


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(each.numel() * each.element_size() for each in parameters)
