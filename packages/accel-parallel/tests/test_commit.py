"""No moment of a crash leaves half a checkpoint, and no failing rank leaves its peers waiting."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from accel_parallel.checkpoint import (
    Checkpoint,
    Item,
    latest_checkpoint,
    next_number,
    numbered_path,
    owner,
    save_checkpoint,
)
from accel_parallel.checkpoint import commit as commit_module
from accel_parallel.checkpoint import manifest as manifest_module
from accel_parallel.checkpoint.folder import LocalFolder, sync_to_disk
from accel_parallel.checkpoint.layout import previous_path, recover
from accel_parallel.checkpoint.staging import LocalStaging
from accel_state import CheckpointError, Process, ProcessSettings
from accel_state.testing import RankError, run_ranks

CRASH = 77
TORN = ("write",)
"""Operations that may also stop half-way."""


def save(final: Path, step: int) -> None:
    """What a run saves: the main process the model and more, every rank its own part."""
    process = Process.current()
    rank = process.topology.rank
    owned = [Item(f"rng_{rank}", "rng", {"seed": torch.tensor(step), "rank": rank})]
    if process.topology.is_main:
        owned += [
            Item("model", "model", {"weight": torch.full((64,), float(step))}),
            Item("progress", "progress", {"step": step}),
        ]
    save_checkpoint(final, owned, process=process, step=step, strategy="any")


def saved_step(folder: Path, world_size: int = 1) -> int:
    """Reads everything, and checks that it is complete and of one save."""
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.items) == {"model", "progress", *(f"rng_{rank}" for rank in range(world_size))}
    steps = {
        checkpoint.manifest.step,
        checkpoint.read("progress")["step"],
        checkpoint.read("model")["weight"][0].item(),
    }
    steps |= {checkpoint.read(f"rng_{rank}")["seed"].item() for rank in range(world_size)}
    assert len(steps) == 1, steps
    return int(steps.pop())


class Faults:
    """Counts what a save does to the disk, and strikes at one place."""

    def __init__(self, at: int | None, when: str, strike: Callable[[], None]) -> None:
        self.at, self.when, self.strike = at, when, strike
        self.seen: list[str] = []

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            number = len(self.seen)
            self.seen.append(name)
            if number == self.at and self.when == "before":
                self.strike()
            if number == self.at and self.when == "torn":
                args = (args[0], args[1][: len(args[1]) // 2])
            answer = original(*args, **kwargs)
            if number == self.at and self.when != "before":
                self.strike()
            return answer

        return operation

    @contextmanager
    def installed(self) -> Iterator[None]:
        places = [
            (os, "fsync"),
            (os, "unlink"),
            (os, "rmdir"),
            (Path, "rename"),
            (Path, "mkdir"),
            (os, "write"),
        ]
        with ExitStack() as stack:
            # One file after the other, so that the n-th operation is the same one each time.
            stack.enter_context(patch.object(commit_module, "NUM_THREADS", 1))
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, self.wrap(name, getattr(owner, name))))
            yield


def count_operations(final: Path) -> list[str]:
    faults = Faults(None, "", lambda: None)
    with faults.installed():
        save(final, 1)
    return faults.seen


def points(operations: list[str]) -> list[tuple[int, str]]:
    found = [(number, when) for number in range(len(operations)) for when in ("before", "after")]
    return found + [(number, "torn") for number, name in enumerate(operations) if name in TORN]


def crash_in_child(final: Path, at: int, when: str) -> None:
    """A save in a fork of this process, which ends at once at that place."""
    child = os.fork()
    if child == 0:
        try:
            with Faults(at, when, lambda: os._exit(CRASH)).installed():
                save(final, 1)
            os._exit(0)
        except BaseException:  # whatever it is must not go on into the tests
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == CRASH


@pytest.fixture
def _alone() -> Iterator[None]:
    with Process.open(ProcessSettings(device="cpu")):
        yield


def prepared(folder: Path, kind: str) -> Path:
    """A folder with a checkpoint of step 0, and where the one of step 1 is to go."""
    folder.mkdir()
    final = numbered_path(folder, 0)
    save(final, 0)
    return numbered_path(folder, 1) if kind == "new" else final


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("kind", ["new", "overwritten"])
def test_a_crash_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    operations = count_operations(prepared(tmp_path / "count", kind))
    assert operations.count("rename") == (1 if kind == "new" else 3)
    outcomes = []
    for number, (at, when) in enumerate(points(operations)):
        folder = tmp_path / str(number)
        final = prepared(folder, kind)
        crash_in_child(final, at, when)
        latest = latest_checkpoint(folder)
        assert latest is not None
        outcomes.append(saved_step(latest))
        if outcomes[-1] == 1:
            assert latest == final
        # The next run goes on, and clears up.
        save(numbered_path(folder, next_number(folder)), 2)
        latest = latest_checkpoint(folder)
        assert latest is not None
        assert saved_step(latest) == 2
        if kind == "overwritten":
            save(final, 3)
            assert saved_step(final) == 3
        assert [name for name in os.listdir(folder) if name.startswith(".")] == []
    assert set(outcomes) == {0, 1}
    renames = [number for number, name in enumerate(operations) if name == "rename"]
    commit = renames[0] if kind == "new" else renames[1]
    for (at, when), outcome in zip(points(operations), outcomes, strict=True):
        assert outcome == (at > commit or (at == commit and when == "after")), (at, when)


@pytest.mark.usefixtures("_alone")
def test_a_crash_while_another_takes_the_name_is_recovered_on_loading(tmp_path: Path) -> None:
    final = tmp_path / "run"
    save(final, 0)
    for at, when in points(count_operations(final)):
        save(final, 0)
        crash_in_child(final, at, when)
        recover(final)
        assert saved_step(final) in (0, 1)
        assert not previous_path(final).exists()


def crashing(final: Path, crash_rank: int, at: int, when: str) -> None:
    if Process.current().topology.rank != crash_rank:
        save(final, 1)
        return
    with Faults(at, when, lambda: os._exit(CRASH)).installed():
        save(final, 1)


def count_on(final: Path) -> list[str]:
    return count_operations(final)


@pytest.mark.parametrize("kind", ["new", "overwritten"])
def test_a_crash_of_one_of_two_leaves_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    counted = tmp_path / "count"
    run_ranks(save, 2, numbered_path(counted, 0), 0)
    of_ranks = run_ranks(count_on, 2, numbered_path(counted, 1 if kind == "new" else 0))
    outcomes = []
    for crash_rank, operations in enumerate(of_ranks):
        # What comes before the commit is the same for both kinds.
        first = operations.index("rename") if kind == "overwritten" and crash_rank == 0 else 0
        if kind == "overwritten" and crash_rank == 1:
            continue
        for at in range(first, len(operations)):
            folder = tmp_path / f"{crash_rank}-{at}"
            run_ranks(save, 2, numbered_path(folder, 0), 0)
            final = numbered_path(folder, 1 if kind == "new" else 0)
            with pytest.raises(RankError, match=f"exit code {CRASH}"):
                run_ranks(crashing, 2, final, crash_rank, at, "before", timeout_s=20.0)
            latest = latest_checkpoint(folder)
            assert latest is not None
            outcomes.append(saved_step(latest, 2))
    assert 0 in outcomes
    assert 1 in outcomes


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("kind", ["new", "overwritten"])
def test_a_full_disk_anywhere_keeps_what_was_saved(tmp_path: Path, kind: str) -> None:
    operations = count_operations(prepared(tmp_path / "count", kind))
    for number, name in enumerate(operations):
        if name in ("unlink", "rmdir"):
            continue  # clearing up after the commit needs no room
        folder = tmp_path / str(number)
        final = prepared(folder, kind)
        with Faults(number, "before", full).installed(), pytest.raises(CheckpointError, match="No space left"):
            save(final, 1)
        latest = latest_checkpoint(folder)
        assert latest is not None
        assert saved_step(latest) in (0, 1)
        assert [each for each in os.listdir(folder) if ".tmp-" in each] == []
        save(final, 2)
        assert saved_step(final) == 2
        assert [each for each in os.listdir(folder) if each.startswith(".")] == []


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("kind", ["new", "overwritten"])
def test_an_interrupt_anywhere_keeps_what_was_saved(tmp_path: Path, kind: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt("Ctrl-C")

    operations = count_operations(prepared(tmp_path / "count", kind))
    for number, (at, when) in enumerate(points(operations)):
        folder = tmp_path / str(number)
        final = prepared(folder, kind)
        with Faults(at, when, interrupt).installed(), pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
            save(final, 1)
        latest = latest_checkpoint(folder)
        assert latest is not None
        assert saved_step(latest) in (0, 1)
        if operations[at] != "mkdir":
            assert [each for each in os.listdir(folder) if ".tmp-" in each] == []


@pytest.mark.usefixtures("_alone")
def test_a_small_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        save(disk / "run", 0)
        large = [Item("model", "model", {"weight": torch.zeros(100_000)})]
        with pytest.raises(CheckpointError, match=r"rank 0: OSError.*earlier ones are untouched"):
            save_checkpoint(disk / "run", large, process=Process.current(), step=1, strategy="any")
        assert saved_step(disk / "run") == 0
        assert os.listdir(disk) == ["run"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Failures of a rank


def slowly(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(*args: Any) -> Any:
        time.sleep(0.3)
        return original(*args)

    return operation


def failing(final: Path, kind: str) -> str:
    process = Process.current()
    rank = process.topology.rank
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    item = Item(f"part_{rank}", "custom", {"weight": torch.ones(100_000)})
    if rank == 1:
        if kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        elif kind == "object":
            item = Item("part_1", "custom", {"fn": print})
        elif kind == "meta":
            item = Item("part_1", "model", {"weight": torch.ones(1, device="meta")})
        elif kind == "name":
            item = Item("part_0", "custom", {})
        elif kind == "bug":
            item = Item("part_1", "custom", Unruly())
    with ExitStack() as stack:
        stack.enter_context(patch.object(LocalStaging, "abandon", slowly(LocalStaging.abandon)))
        caught = stack.enter_context(pytest.raises(CheckpointError, match="could not"))
        save_checkpoint(final, [item], process=process, step=0, strategy="any")
    if "nothing of it was kept" in str(caught.value) or kind == "name":
        assert os.listdir(final.parent) == []  # on every rank, also those that remove nothing themselves
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return str(caught.value)


class Unruly(dict[str, Any]):
    def __init__(self) -> None:
        super().__init__(a=1)

    def items(self) -> Any:
        raise RuntimeError("its state is not there")

    def values(self) -> Any:
        raise RuntimeError("its state is not there")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("limit", "rank 1: OSError: "),
        ("object", "rank 1: CheckpointError: `part_1.fn`"),
        ("meta", "rank 1: CheckpointError: The tensor `weight` of `part_1` is on the meta device"),
        ("name", r"Rank 1 and another both saved an item called ['part_0']"),
        ("bug", "rank 1: RuntimeError: its state is not there"),
    ],
)
def test_all_ranks_raise_what_one_of_them_met(tmp_path: Path, kind: str, named: str) -> None:
    messages = run_ranks(failing, 3, tmp_path / "run", kind)
    assert len(set(messages)) == 1
    assert named in messages[0]
    assert os.listdir(tmp_path) == []


def failing_to_clear_up(final: Path) -> str:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    process = Process.current()
    item = Item(f"part_{process.topology.rank}", "custom", {"weight": torch.ones(2)})
    with ExitStack() as stack:
        stack.enter_context(patch.object(LocalStaging, "abandon", fail))
        if process.topology.rank == 1:
            stack.enter_context(patch.object(LocalFolder, "write", full))
        told = stack.enter_context(patch.object(commit_module.logger, "warning"))
        caught = stack.enter_context(pytest.raises(CheckpointError))
        save_checkpoint(final, [item], process=process, step=0, strategy="any")
    if process.topology.is_main:
        assert "could not be removed" in told.call_args.args[0]
    return str(caught.value)


def test_what_failed_first_is_told_where_nothing_can_be_cleared_up(tmp_path: Path) -> None:
    first, second = run_ranks(failing_to_clear_up, 2, tmp_path / "run")
    assert first == second
    assert "rank 1: OSError: [Errno 28] No space left" in first


@pytest.mark.parametrize("way", ["a/run", "run", "/"])
def test_all_ranks_raise_what_is_in_the_way(tmp_path: Path, way: str) -> None:
    (tmp_path / "a").write_text("a file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    messages = run_ranks(failing, 2, tmp_path / way if way != "/" else Path("/"), "")
    assert len(set(messages)) == 1
    assert "The main process could not begin the checkpoint" in messages[0]
    assert sorted(os.listdir(tmp_path)) == ["a", "run"]
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


# Folders that others left, or hold


@pytest.mark.usefixtures("_alone")
def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    host = owner.host_name()
    dead = [f".checkpoint_7.tmp-{host}-{child.pid}-0123abcd", ".checkpoint_2.removed"]
    alive = [
        f".checkpoint_8.tmp-{host}-{os.getpid()}-0123abcd",
        f".checkpoint_8.tmp-{host}-1-0123abcd",
        f".checkpoint_9.tmp-elsewhere-{child.pid}-0123abcd",
        ".notes.tmp-mine",
        ".mine.removed",
    ]
    for name in [*dead, *alive]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    save(numbered_path(tmp_path, 0), 0)
    assert sorted(os.listdir(tmp_path)) == sorted([*alive, "checkpoint_0"])


@pytest.mark.usefixtures("_alone")
def test_others_processes_count_as_living(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert owner.lives(1)


@pytest.mark.usefixtures("_alone")
def test_an_empty_folder_or_a_link_may_be_there_already(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", 1)
    assert saved_step(tmp_path / "empty") == 1
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()  # what it names was replaced, where that lies
    assert saved_step(tmp_path / "empty") == 2
    assert sorted(os.listdir(tmp_path)) == ["empty", "link"]


@pytest.mark.usefixtures("_alone")
def test_a_relative_path_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("run"), 1)
    assert saved_step(Path("run")) == 1


@pytest.mark.usefixtures("_alone")
def test_a_name_that_cannot_be_taken_gives_the_old_one_back(tmp_path: Path) -> None:
    final = tmp_path / "run"
    save(final, 0)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    with patch.object(Path, "rename", refuse), pytest.raises(CheckpointError, match="resource busy"):
        save(final, 1)
    assert saved_step(final) == 0
    assert os.listdir(tmp_path) == ["run"]


def test_versions_of_what_is_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_LIBRARIES", ("torch", "no-such-distribution"))
    assert list(manifest_module._versions()) == ["torch"]


def test_flushing_something_that_is_not_there_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        sync_to_disk(tmp_path / "nothing")


def numbers(folder: Path) -> list[int]:
    """Two runs of two saves each, as they number them."""
    process = Process.current()
    taken = []
    for step in range(2):
        number = next_number(folder)
        process.barrier()
        save(numbered_path(folder, number), step)
        taken.append(number)
    return taken


def test_numbers_go_on_after_a_resume(tmp_path: Path) -> None:
    assert run_ranks(numbers, 2, tmp_path) == [[0, 1]] * 2
    assert run_ranks(numbers, 1, tmp_path) == [[2, 3]]
