"""One process pulls a trigger, and all see it at the next check."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accel import Accelerator, ConfigError
from accel_state.testing import run_ranks


def pulled(by_step: list[set[int]], resets: bool) -> list[bool]:
    """On a rank: what each check gives when these ranks set the trigger before it."""
    accelerator = Accelerator(cpu=True)
    seen = []
    for ranks in by_step:
        if accelerator.process_index in ranks:
            accelerator.set_trigger()
        if resets or ranks:
            seen.append(accelerator.check_trigger())
    return seen


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_rank_triggers_all_and_a_check_resets(world: int) -> None:
    last = world - 1
    by_step = [set(), {last}, set(), {0}, set(range(world)), set(), set()]
    expected = [bool(ranks) for ranks in by_step]
    assert run_ranks(pulled, world, by_step, True) == [expected] * world


def keep() -> list[bool]:
    """On a rank: rank 1 sets the trigger long before anybody checks, and twice."""
    accelerator = Accelerator(cpu=True)
    if accelerator.process_index == 1:
        accelerator.set_trigger()
        accelerator.set_trigger()
    accelerator.wait_for_everyone()
    return [accelerator.check_trigger(), accelerator.check_trigger()]


def test_a_trigger_waits_for_the_check() -> None:
    assert run_ranks(keep, 2) == [[True, False]] * 2


def inside_the_block_for_uneven_inputs() -> str:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(1, 1))
    with accelerator.join_uneven_inputs([model]):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        accelerator.set_trigger()
        with pytest.raises(ConfigError, match=r"`check_trigger` was called inside `join_uneven_inputs`") as caught:
            accelerator.check_trigger()
    assert accelerator.check_trigger()
    return str(caught.value)


def test_a_check_is_refused_where_ranks_may_be_through() -> None:
    assert len(set(run_ranks(inside_the_block_for_uneven_inputs, 2))) == 1
