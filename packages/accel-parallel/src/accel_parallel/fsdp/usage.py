"""Whether all ranks use the same parameters of sharded models, as the exchange of their gradients takes for granted.

`fully_shard` lays the gradients that a unit has one after the other and reduces that. Where ranks have those of
different parameters, as behind a branch on the data, it adds one parameter's gradient to another's without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from accel_state.collectives import gather_object
from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["Usage"]

_EVERY = 64
"""Steps between comparisons, after those of the first, second, fourth and so on: nothing that a run could notice."""


class Usage:
    """Which parameters of one optimizer got gradients, step by step."""

    __slots__ = ("_digest", "_steps")

    def __init__(self) -> None:
        self._digest = 0
        """Of all steps since the beginning. Ranks that ever differed differ for good."""
        self._steps = 0

    def observe(
        self, optimizer: Optimizer, *, names: Callable[[], Mapping[torch.Tensor, str]], process: Process
    ) -> None:
        """Every rank must call this, before each step.

        Raises:
            ConfigError: on every rank, naming parameters that only some ranks have a gradient of.
        """
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        used = tuple(each.grad is not None for each in parameters)
        self._digest = hash((self._digest, used)) >> 2  # the same in every process, for no strings are in it
        self._steps += 1
        if self._steps % _EVERY and self._steps & (self._steps - 1):
            return
        bounds = torch.tensor([self._digest, -self._digest], device=process.device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        largest, smallest = bounds.tolist()
        if largest != -smallest:
            of_ranks: list[tuple[bool, ...]] = gather_object([used], process=process)
            named = names()
            known = [named.get(each, f"a parameter of shape {tuple(each.shape)}") for each in parameters]
            raise ConfigError(_difference(of_ranks, known, self._steps))


def _difference(of_ranks: Sequence[tuple[bool, ...]], names: Sequence[str], step: int) -> str:
    odd = [index for index in range(len(names)) if len({used[index] for used in of_ranks}) > 1]
    if odd:
        with_it = [str(rank) for rank, used in enumerate(of_ranks) if used[odd[0]]]
        more = f" (and {len(odd) - 1} others differ too)" if len(odd) > 1 else ""
        what = f"Before step {step}, `{names[odd[0]]}` has a gradient on rank(s) {', '.join(with_it)} only{more}"
    else:
        what = f"In one of the last {min(step, _EVERY)} steps, some parameters had a gradient on some ranks only"
    return (
        f"{what}, and gradients of sharded models are reduced by their place, so that those of different parameters "
        f"are added up. Let every rank use the same parameters, for example by adding `0.0 * out.sum()` of what would "
        f"be left out to the loss; or train with DDP and "
        f"`DistributedDataParallelKwargs(find_unused_parameters=True)`."
    )
