"""Rank 0 reads, and every rank gets what is its own. On real processes, but for a world of one."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from accel_data.channel import HEAD_BYTES, Kind
from accel_data.dispatch import DispatchedSteps, TreeChannel
from accel_data.packing import SMALL_BYTES
from accel_state.errors import ConfigError
from accel_state.process import Process, ProcessSettings
from accel_state.testing import run_ranks
from accel_state.topology import MeshShape, Topology

LARGE = SMALL_BYTES + 8


class Side:
    """A rank of a test: its steps, and what it has seen."""

    def __init__(self, timeout_s: float = 30.0) -> None:
        self.topology = Process.current().topology
        self.rank = self.topology.rank
        self.channel = TreeChannel(self.topology, timeout=timedelta(seconds=timeout_s))
        self.steps = DispatchedSteps(self.channel, self.topology)

    def iterate(self, steps: Any) -> Iterator[Any]:
        return self.steps.deal(steps) if self.rank == 0 else self.steps.take()

    def wait(self) -> None:
        Process.current().barrier()


def numbered(length: int, world: int = 2, *, mark: int = 0, size: int = LARGE) -> Iterator[list[Any]]:
    """Large tensors that say whose they are: mark, step, data rank."""
    for step in range(length):
        yield [torch.tensor([mark, step, place] + [0] * size) for place in range(world)]


def said(tree: torch.Tensor) -> list[int]:
    head: list[int] = tree[:3].tolist()
    return head


def raised(iterator: Iterator[Any]) -> tuple[str, str]:
    """Kind and text of what going on raises."""
    try:
        got = next(iterator)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "nothing", repr(got)


def ragged(world: int) -> Iterator[list[Any]]:
    """Structure, sizes and leaves differ by rank and step; some steps repeat the skeleton of the one before."""
    for step in range(8):
        yield [
            None
            if (place, step) == (1, 2)
            else {
                "ids": torch.arange(place * 100, place * 100 + 10 * (step // 2) + place),
                "nested": (torch.tensor(step), [torch.full((LARGE + step // 2,), place, dtype=torch.bfloat16)]),
                "text": ["short", "x" * (HEAD_BYTES if step == 5 else 1)],
                "flags": torch.tensor([True, False]),
                "empty": torch.empty(0, 3),
            }
            for place in range(world)
        ]


def described(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: described(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [described(each) for each in tree]
    return (str(tree.dtype), tuple(tree.shape), tree.tolist()) if isinstance(tree, torch.Tensor) else tree


def read_ragged() -> Any:
    side = Side()
    got = []
    for tree in side.iterate(ragged(side.topology.data_world_size)):
        got.append(tree)
        if tree is not None:
            tree["text"].append("a consumer's own")  # of this step only
    side.channel.close()
    side.channel.close()
    return [described(each) for each in got]


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_its_own_ragged_and_nested_trees(world: int) -> None:
    expected = [described(trees) for trees in ragged(world)]
    for trees in expected:
        for tree in trees:
            if tree is not None:
                tree["text"].append("a consumer's own")
    assert run_ranks(read_ragged, world) == [[trees[rank] for trees in expected] for rank in range(world)]


def read_as_peers() -> Any:
    """Rank 0 overwrites what it was given before its peer, which gets the same tree, has asked for it."""
    side = Side()
    got = []
    iterator = side.iterate(numbered(3, side.topology.data_world_size))
    for step in range(3):
        if side.rank == 1:
            time.sleep(0.1)
        tree = next(iterator)
        got.append((said(tree), int(tree[3:].sum())))
        if side.rank == 0:
            tree.fill_(-1)
        side.wait() if step == 1 else None
    return got


def test_peers_along_tp_get_the_same_and_what_rank_0_writes_to_its_own_does_not_reach_them() -> None:
    settings = ProcessSettings(device="cpu", mesh=MeshShape(dp_shard=2, tp=2))
    got = run_ranks(read_as_peers, 4, settings=settings)
    assert got == [[([0, step, place], 0) for step in range(3)] for place in (0, 0, 1, 1)]


def iterate_again_and_again() -> Any:
    """Whole iterations, empty ones and ones that all ranks leave at the same step, in turns."""
    side = Side()
    got = []
    for number, (length, limit) in enumerate([(3, 9), (5, 2), (0, 9), (5, 1), (4, 4), (3, 9), (6, 3), (2, 9)]):
        seen = []
        for tree in side.iterate(numbered(length, mark=number, size=LARGE if number % 2 else 1)):
            seen.append(said(tree))
            if len(seen) == limit:
                break
        got.append(seen)
    return got


def test_an_iteration_that_all_leave_at_the_same_step_leaves_nothing_for_the_next_one() -> None:
    lengths = [3, 2, 0, 1, 4, 3, 3, 2]
    expected = [
        [[[number, step, rank] for step in range(length)] for number, length in enumerate(lengths)] for rank in (0, 1)
    ]
    assert run_ranks(iterate_again_and_again, 2) == expected


def leave_on_rank_0_first(size: int) -> Any:
    side = Side()
    iterator = side.iterate(numbered(9, size=size))
    for _ in range(3):
        next(iterator)
    problem = None
    if side.rank == 0:
        iterator.close()  # type: ignore[attr-defined]
    else:
        problem = raised(iterator)
    again = [said(tree) for tree in side.iterate(numbered(2, mark=1, size=size))]
    return problem, again


@pytest.mark.parametrize("size", [1, LARGE])
def test_a_rank_that_asks_for_more_than_rank_0_read_is_told_and_the_next_iteration_is_whole(size: int) -> None:
    (_, first), (problem, second) = run_ranks(leave_on_rank_0_first, 2, size)
    kind, text = problem
    assert kind == "DispatchError"
    assert "Rank 1 asked for batch 4 of iteration 1, but rank 0" in text
    assert "left its loop after 3 batch(es)" in text
    assert first == [[1, 0, 0], [1, 1, 0]]
    assert second == [[1, 0, 1], [1, 1, 1]]


def leave_on_rank_1_first(size: int) -> Any:
    side = Side()
    iterator = side.iterate(numbered(9, size=size))
    for _ in range(3):
        next(iterator)
    if side.rank == 0:
        for _ in range(6):
            problem = raised(iterator)
            if problem[0] != "nothing":
                return problem
        return raised(iterator)
    iterator.close()  # type: ignore[attr-defined]
    return raised(side.iterate(None))


@pytest.mark.parametrize("size", [1, LARGE])
def test_a_rank_that_left_early_and_iterates_again_gets_no_batch_of_the_iteration_it_left(size: int) -> None:
    first, second = run_ranks(leave_on_rank_1_first, 2, size)
    assert second[0] == "DispatchError"
    assert "Rank 1 asked for batch 1 of iteration 2, but rank 0" in second[1]
    assert "sent batch 4 of iteration 1, an iteration that this rank left after 3 batch(es)" in second[1]
    assert first[0] == "DispatchError"
    assert "read a batch for rank 1, and could not hand it over" in first[1]


def never_ask_again() -> Any:
    side = Side(timeout_s=0.5)
    iterator = side.iterate(numbered(9))
    next(iterator)
    if side.rank:
        iterator.close()  # type: ignore[attr-defined]
        time.sleep(2.0)
        return None
    next(iterator)  # under way for ever
    began = time.monotonic()
    return raised(iterator), time.monotonic() - began


def test_a_rank_that_lives_and_never_asks_is_waited_for_until_the_timeout() -> None:
    ((kind, text), seconds), _ = run_ranks(never_ask_again, 2)
    assert kind == "DispatchError"
    assert "for rank 1, and could not hand it over" in text
    assert seconds < 2.0


def fail_to_read(error: BaseException | None, world: int) -> Any:
    def steps() -> Iterator[list[Any]]:
        yield from numbered(2, world)
        if error is not None:
            raise error
        yield [lambda: None] * world

    side = Side()
    iterator = side.iterate(steps())
    seen = [said(next(iterator)) for _ in range(2)]
    problem = raised(iterator)
    again = [said(tree) for tree in side.iterate(numbered(2, world, mark=1))]
    return seen, problem, raised(iterator)[0], again


@pytest.mark.parametrize(
    ("error", "kind", "quoted"),
    [
        (ValueError("no such file: shard-7"), "ValueError", "ValueError: no such file: shard-7"),
        (KeyboardInterrupt(), "KeyboardInterrupt", "KeyboardInterrupt"),
        (ValueError("begin" + 3 * HEAD_BYTES * "ü" + "end"), "ValueError", "end\n"),
        (None, "ConfigError", "cannot be pickled"),
    ],
    ids=["error", "interrupt", "long", "unsendable"],
)
def test_a_failure_of_rank_0_reaches_every_rank_and_the_next_iteration_is_whole(
    error: BaseException | None, kind: str, quoted: str
) -> None:
    got = run_ranks(fail_to_read, 3, error, 3)
    for rank, (seen, (name, text), after, again) in enumerate(got):
        assert seen == [[0, step, rank] for step in range(2)]
        assert name == (kind if rank == 0 else "DispatchError")
        if rank:
            assert f"Rank {rank} asked for batch 3 of iteration 1, and rank 0" in text
            assert quoted in text
        assert after == "StopIteration"
        assert again == [[1, step, rank] for step in range(2)]


def lose(rank: int) -> Any:
    """One rank's connections end as those of a process that died; it stays, to leave the others time."""
    side = Side()
    iterator = side.iterate(numbered(9, side.topology.data_world_size))
    next(iterator)
    side.wait()
    if side.rank == rank:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as each:
                if each.family in (socket.AF_INET, socket.AF_INET6):
                    each.getpeername()  # raises for one that only listens
                    each.shutdown(socket.SHUT_RDWR)
        side.channel._finalizer.detach()  # or it would wait at its end for others to hear what it can send no more
        return None
    began = time.monotonic()
    problem = raised(iterator)
    while problem[0] == "nothing":
        problem = raised(iterator)
    return problem, time.monotonic() - began


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="finds its connections in /proc")


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_rank_is_gone_those_that_wait_for_it_raise(rank: int) -> None:
    (kind, text), seconds = run_ranks(lose, 2, rank)[1 - rank]
    assert kind == "DispatchError"
    assert ("the connection to it is lost" if rank == 0 else "for rank 1, and could not hand it over") in text
    assert seconds < 45.0  # as a rule at once, at the latest after the group's timeout of 30


@needs_proc
def test_where_one_rank_is_gone_rank_0_tells_the_others() -> None:
    (kind, text), _ = run_ranks(lose, 3, 1)[2]
    assert kind == "DispatchError"
    if "the connection to it is lost" not in text:  # rank 0 may be gone too by the time that rank 2 asks
        assert "rank 0, which reads for all ranks, failed to read it" in text
        assert "for rank 1, and could not hand it over" in text


def leave_and_end() -> Any:
    side = Side()
    iterator = side.iterate(numbered(9))
    if side.rank:
        time.sleep(0.4)
        return [said(next(iterator))]
    return [said(next(iterator))]


def test_a_process_that_ends_has_handed_out_what_it_has_read() -> None:
    assert run_ranks(leave_and_end, 2) == [[[0, 0, 0]], [[0, 0, 1]]]


def nest() -> Any:
    side = Side()
    got = []
    for outer in side.iterate(numbered(3, mark=1)):
        got.append(said(outer))
        for inner in side.iterate(numbered(2 + len(got), mark=2)):
            got.append(said(inner))
            if len(got) == 5:
                break
    return got


def test_iterations_may_be_nested() -> None:
    first, second = run_ranks(nest, 2)
    assert [each[:2] for each in first] == [each[:2] for each in second]
    assert [each[2] for each in first] == [0] * len(first)
    assert [each[2] for each in second] == [1] * len(second)
    assert len(first) > 6


def end_out_of_turn() -> Any:
    """Rank 0 finishes the outer iteration first, the other rank hears of it while it asks for the inner one."""
    side = Side()
    outer, inner = side.iterate(numbered(1, mark=1)), side.iterate(numbered(2, mark=2))
    got = [said(next(outer)), said(next(inner))]
    if side.rank == 0:
        return [*got, raised(outer)[0], said(next(inner)), raised(inner)[0]]
    return [*got, said(next(inner)), raised(outer)[0], raised(inner)[0]]


def test_the_end_of_an_iteration_is_kept_for_it() -> None:
    _, second = run_ranks(end_out_of_turn, 2)
    assert second == [[1, 0, 1], [2, 0, 1], [2, 1, 1], "StopIteration", "StopIteration"]


def ask_in_another_order() -> Any:
    side = Side()
    first, second = side.iterate(numbered(2, mark=1)), side.iterate(numbered(2, mark=2))
    next(first), next(second)
    return raised(first if side.rank == 0 else second)


def test_iterations_in_another_order_are_refused() -> None:
    _, (kind, text) = run_ranks(ask_in_another_order, 2)
    assert kind == "DispatchError"
    assert (
        "asked for batch 2 of iteration 2, but rank 0, which reads for all ranks, sent batch 2 of iteration 1." in text
    )


def ask_after_closing() -> Any:
    side = Side()
    side.channel.close()
    return raised(side.iterate([])) if side.rank else None


def test_a_closed_channel_says_so() -> None:
    assert run_ranks(ask_after_closing, 2)[1] == (
        "DispatchError",
        "The channel to rank 0 is closed, so no batch can be asked for. Make a new one.",
    )


def talk() -> Any:
    """The channel by itself."""
    side = Side()
    if side.rank:
        return [
            (each.kind, each.iteration, each.step, described(each.content))
            for each in (side.channel.receive() for _ in range(3))
        ]
    side.channel.send([0, "one"], iteration=7, step=8)
    side.channel.send([0, "one"])
    side.channel.close_iteration(Kind.END, 9, 1)
    side.channel.settle()
    return None


def test_the_channel_hands_over_what_it_is_told() -> None:
    assert run_ranks(talk, 2)[1] == [(Kind.BATCH, 7, 8, "one"), (Kind.BATCH, 0, 0, "one"), (Kind.END, 9, 1, None)]


def test_a_world_of_one_yields_its_own() -> None:
    topology = Topology()
    channel = TreeChannel(topology)
    steps = DispatchedSteps(channel, topology)
    own = torch.zeros(3)
    got = list(steps.deal([[own], ["more"]]))
    assert got[0] is own
    assert got[1:] == ["more"]
    for _ in steps.deal([[own], [own]]):
        break
    channel.settle()
    channel.close()


def test_as_many_trees_as_data_ranks_are_needed() -> None:
    topology = Topology()
    with pytest.raises(ConfigError, match=r"2 batches were given to dispatch, and there are 1 data ranks\. Give one"):
        list(DispatchedSteps(TreeChannel(topology), topology).deal([[1, 2]]))


def test_several_processes_need_a_process_group() -> None:
    with pytest.raises(ConfigError, match=r"dispatch batches to 1 other process\(es\), but there is no process group"):
        TreeChannel(Topology(rank=0, world_size=2))
