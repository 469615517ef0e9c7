"""Where a chain of blocks is cut into stages: arithmetic on their sizes, and what users name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import nn

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["check_split_points", "plan_split_points"]


def plan_split_points(sizes: Mapping[str, float], num_stages: int) -> list[str]:
    """Cut a chain of blocks into stages whose largest is as small as it can be.

    Args:
        sizes: bytes, or any other cost that adds up, by name of a block, in the order in which they are computed.
        num_stages: how many stages; each gets at least one block.

    Returns:
        The names of the blocks with which the second and every later stage begin: ``num_stages - 1`` of them. Among
        equally good cuts, the one whose earlier stages are longer, so it is the same on every rank.

    Raises:
        ConfigError: for more stages than blocks, or a size that is no cost.
    """
    names, costs = list(sizes), list(sizes.values())
    if not isinstance(num_stages, int) or isinstance(num_stages, bool) or num_stages < 1:
        raise ConfigError(
            f"`num_stages={num_stages!r}` is not a number of pipeline stages: there is at least one. Give a positive "
            f"integer."
        )
    for name, cost in sizes.items():
        if not cost >= 0:
            raise ConfigError(f"The size of `{name}` is {cost}, and a size cannot be that. Give a number from 0 on.")
    if num_stages > len(names):
        raise ConfigError(
            f"{num_stages} pipeline stages were asked for, and the model has {len(names)} block(s) to divide over "
            f"them. Start at most {len(names)} process(es), or name smaller modules in `split_points`."
        )
    first = _first_blocks(costs, num_stages)
    return [names[index] for index in first[1:]]


def _first_blocks(costs: Sequence[float], num_stages: int) -> list[int]:
    """Index of each stage's first block, by dynamic programming over (stages left, first block left)."""
    count = len(costs)
    before = [0, *accumulate(costs)]
    # best[i]: the largest stage when blocks i.. are cut into as many stages as the round has come to.
    best = [before[count] - before[start] for start in range(count + 1)]
    ends: list[list[int]] = []
    for stages in range(2, num_stages + 1):
        rest, best, round_ends = best, [0.0] * (count + 1), [0] * (count + 1)
        for start in range(count - stages + 1):
            choices = ((max(before[end] - before[start], rest[end]), -end) for end in _ends(start, count, stages))
            best[start], negative = min(choices)
            round_ends[start] = -negative
        ends.append(round_ends)
    first = [0]
    for round_ends in reversed(ends):
        first.append(round_ends[first[-1]])
    return first


def _ends(start: int, count: int, stages: int) -> range:
    """Where a stage from `start` on may end, leaving a block for each of the ``stages - 1`` after it."""
    return range(start + 1, count - stages + 2)


def check_split_points(model: nn.Module, split_points: Sequence[str], num_stages: int) -> tuple[str, ...]:
    """The modules of `model` that users named to begin the second and every later stage.

    Raises:
        ConfigError: for names that the model does not have, twice the same, and another number than the stages need.
    """
    given = tuple(split_points)
    known = [name for name, _ in model.named_modules() if name]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"`split_points` names {name!r}, which is no module of `{type(model).__name__}`, so no stage can begin "
                f"there.{did_you_mean(str(name), known)} Use names as in `model.named_modules()`."
            )
    if len(set(given)) != len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise ConfigError(
            f"`split_points` names {twice!r} twice, and one module begins one stage. Name each of them once."
        )
    if len(given) != num_stages - 1:
        raise ConfigError(
            f"`split_points` has {len(given)} name(s), which make {len(given) + 1} stage(s), and there are "
            f"{num_stages} processes with one stage each. Name {num_stages - 1} module(s), or start "
            f"{len(given) + 1} process(es)."
        )
    for name in given:
        inside = next((other for other in given if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise ConfigError(
                f"`split_points` names {name!r}, which lies inside {inside!r}, where a stage begins too. Name modules "
                f"that follow each other."
            )
    return given
