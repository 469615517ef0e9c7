"""Processes that are killed while they save: the ranks of a run, and those that write for them."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from accel_parallel.checkpoint import About, BackgroundSaver, Checkpoint, Item, save_checkpoint, write_checkpoint
from accel_parallel.checkpoint import background as background_module
from accel_parallel.checkpoint.folder import LocalFolder
from accel_parallel.checkpoint.host_buffer import HostBuffer
from accel_state import CheckpointError, Process
from accel_state.testing import RankError, run_ranks


def items_of(rank: int, step: int) -> list[Item]:
    """Each rank its own part."""
    return [Item(f"part_{rank}", "custom", {"values": torch.full((64,), step), "rank": rank})]


def save(final: Path, step: int, world: int) -> None:
    """A checkpoint like those of the ranks, by one process."""
    items = [item for rank in range(world) for item in items_of(rank, step)]
    write_checkpoint(final, items, about=About(step=step, strategy="any", world_size=world), sync=False)


def saved_step(folder: Path, world: int) -> int:
    """Reads everything, and checks that it is complete and of one save."""
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.items) == {f"part_{rank}" for rank in range(world)}
    steps = {checkpoint.manifest.step}
    for rank in range(world):
        steps |= set(checkpoint.read(f"part_{rank}")["values"].tolist())
    assert len(steps) == 1, steps
    return int(steps.pop())


def killed_while_it_writes(folder: str, victim: int) -> tuple[str, list[str], int]:
    """On a rank: one rank's writer is killed before it can have done its part; then all save again."""
    process = Process.current()
    rank, world = process.topology.rank, process.topology.world_size
    saver = BackgroundSaver(process)
    saver.save(Path(folder, "run"), items_of(rank, 0), step=0, strategy="any")
    stopped = patch.object(background_module, "_CODE", "import signal; signal.pause()") if rank == victim else None
    with stopped or nullcontext():
        pending = saver.save(Path(folder, "run"), items_of(rank, 1), step=1, strategy="any")
    if rank == victim:
        os.kill(child_of(os.getpid(), "signal.pause"), signal.SIGKILL)
    with pytest.raises(CheckpointError, match="Earlier ones are untouched") as caught:
        pending.wait()
    process.barrier()
    left, step = os.listdir(folder), saved_step(Path(folder, "run"), world)
    saver.save(Path(folder, "run"), items_of(rank, 2), step=2, strategy="any").wait()
    saver.close()
    return str(caught.value), left, step


def child_of(pid: int, command: str) -> int:
    """The process that `pid` has started with such a word in its command line."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):
                if command in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        time.sleep(0.01)
    raise AssertionError(f"{pid} has no child with `{command}`")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_is_killed_leaves_what_was_saved(tmp_path: Path, victim: int) -> None:
    for message, left, step in run_ranks(killed_while_it_writes, 2, str(tmp_path), victim):
        assert "the process that wrote it ended with code -9" in message
        assert left == ["run"]  # nothing waits for the run to end to be cleared up
        assert step == 0
    assert saved_step(tmp_path / "run", 2) == 2


def killed_itself(folder: str, blocking: bool) -> None:
    """On a rank: rank 1 is killed in the middle of its part of a save."""
    process = Process.current()
    rank = process.topology.rank
    if blocking:
        write = LocalFolder.write

        def die(to: LocalFolder, name: str, chunks: Any, *, sync: bool) -> Any:
            if rank == 1 and name.endswith(".safetensors"):
                write(to, name, list(chunks)[:1], sync=sync)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(to, name, chunks, sync=sync)

        with patch.object(LocalFolder, "write", die):
            save_checkpoint(Path(folder, "run"), items_of(rank, 1), process=process, step=1, strategy="any")
    saver = BackgroundSaver(process)
    saver.save(Path(folder, "run"), items_of(rank, 1), step=1, strategy="any")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    saver.settle()


def test_a_rank_that_is_killed_while_it_saves_leaves_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path / "run", 0, 2)
    with pytest.raises(RankError, match="Rank 1 died without a word, killed by signal SIGKILL"):
        run_ranks(killed_itself, 2, str(tmp_path), True, timeout_s=20.0)
    assert saved_step(tmp_path / "run", 2) == 0
    save(tmp_path / "run", 3, 2)
    assert saved_step(tmp_path / "run", 2) == 3
    assert os.listdir(tmp_path) == ["run"]


def test_a_rank_that_is_killed_while_its_writer_writes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "run", 0, 2)
    with pytest.raises(RankError, match="Rank 1 died without a word, killed by signal SIGKILL"):
        run_ranks(killed_itself, 2, str(tmp_path), False, timeout_s=20.0)
    # Whether the main process's writer was killed too, by those who clear up after a test, before it was done.
    assert saved_step(tmp_path / "run", 2) in (0, 1)


def filled_by_one(folder: str) -> tuple[str, list[str]]:
    """On a rank: copying fails on one, which must not leave the other with a save of its own."""
    process = Process.current()
    rank = process.topology.rank
    saver = BackgroundSaver(process)
    failing = patch.object(HostBuffer, "put", side_effect=RuntimeError("out of memory")) if rank == 1 else None
    with failing or nullcontext(), pytest.raises(CheckpointError, match="could not be written") as caught:
        saver.save(Path(folder, "run"), items_of(rank, 0), step=0, strategy="any")
    assert saver.pending is None
    process.barrier()
    left = os.listdir(folder)
    process.barrier()
    saver.save(Path(folder, "run"), items_of(rank, 2), step=2, strategy="any").wait()
    saver.close()
    return str(caught.value), left


def test_a_copy_that_fails_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    for message, left in run_ranks(filled_by_one, 2, str(tmp_path)):
        assert "(rank 1: RuntimeError: out of memory)" in message
        assert left == []
    assert saved_step(tmp_path / "run", 2) == 2
