"""Whatever ends a writer, and wherever: a whole checkpoint is there, nothing else is taken for one, and it is said."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from accel_parallel.checkpoint import (
    About,
    Checkpoint,
    Item,
    latest_checkpoint,
    next_number,
    numbered_path,
    write_checkpoint,
)
from accel_parallel.checkpoint import writer as writer_module
from accel_parallel.checkpoint.background import BackgroundSaver
from accel_parallel.checkpoint.folder import LocalFolder
from accel_parallel.checkpoint.layout import previous_path
from accel_parallel.checkpoint.outgoing import Outgoing
from accel_parallel.checkpoint.shelf import LocalShelf
from accel_parallel.checkpoint.staging import staging_of
from accel_parallel.checkpoint.writer import Job, Links, perform
from accel_state import CheckpointError, Process, ProcessSettings

CRASH, FAILED = 77, 3
DISK = [(os, "write"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (Path, "rename")]
"""What a writer does to the disk. A receipt is read again and again, which does nothing to it."""
QUIET = Links(lambda _: None, lambda: False, lambda: False)
GIVEN_UP = Links(lambda _: None, lambda: True, lambda: False)
ORPHANED = Links(lambda _: None, lambda: False, lambda: True)
"""The run is gone."""


def items_of(rank: int, step: int) -> list[Item]:
    """Each rank its own part, the main process the model and more."""
    items = [Item(f"rng_{rank}", "rng", {"seed": torch.tensor(step), "rank": rank})]
    if rank == 0:
        items += [
            Item("model", "model", {"weight": torch.full((64,), float(step))}),
            Item("progress", "progress", {"step": step}),
        ]
    return items


def job_of(final: Path, token: str, step: int, *, rank: int = 0, world: int = 1, **changes: Any) -> tuple[Job, Any]:
    """What `BackgroundSaver` would hand a writer of this rank, and the memory that goes with it."""
    share = Outgoing(items_of(rank, step)).alone()
    memory = bytearray()
    files = []
    for file in share.files:
        ranges = []
        for content in file.chunks():
            ranges.append((len(memory), len(memory) + len(content)))
            memory += content
        files.append((file.name, ranges))
    job = Job(
        location=str(final),
        token=token,
        is_new=not (final / "manifest.json").exists(),
        rank=rank,
        world_size=world,
        sync=True,
        items={name: asdict(record) for name, record in share.records.items()},
        files=files,
        about=asdict(About(step=step, strategy="any", world_size=world)) if rank == 0 else None,
    )
    return replace(job, **changes), memoryview(memory)


def save(final: Path, step: int, world: int = 1) -> None:
    """A checkpoint like those, by a process that no fault strikes."""
    items = [item for rank in range(world) for item in items_of(rank, step)]
    write_checkpoint(final, items, about=About(step=step, strategy="any", world_size=world), sync=False)


def saved_step(folder: Path | None, world: int = 1) -> int:
    """Reads everything, and checks that it is complete and of one save."""
    assert folder is not None
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    assert set(checkpoint.items) == {"model", "progress", *(f"rng_{rank}" for rank in range(world))}
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *checkpoint.manifest.files}
    steps = {checkpoint.manifest.step, checkpoint.read("progress")["step"]}
    steps |= set(checkpoint.read("model")["weight"].tolist())
    steps |= {checkpoint.read(f"rng_{rank}")["seed"].item() for rank in range(world)}
    assert len(steps) == 1, steps
    return int(steps.pop())


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended, as that of a run that is gone."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


class Faults:
    """Counts what is done to the disk, and strikes at one place."""

    def __init__(self, at: int | None = None, when: str = "", strike: Callable[[], None] = lambda: None) -> None:
        self.at, self.when, self.strike = at, when, strike
        self.seen: list[str] = []

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
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
    def installed(self) -> Iterator[list[str]]:
        with ExitStack() as stack:
            # One file after the other, so that the n-th operation is the same one each time.
            stack.enter_context(patch.object(writer_module, "_NUM_THREADS", 1))
            stack.enter_context(patch.object(writer_module, "_ORPHAN_WAIT_S", 0.0))
            for owner, name in DISK:
                # A process that ends does not lose what it has written, flushed or not; and flushing takes long.
                original = getattr(owner, name) if name != "fsync" else lambda _: None
                stack.enter_context(patch.object(owner, name, self._wrap(name, original)))
            yield self.seen


def points(operations: list[str]) -> list[tuple[int, str]]:
    found = [(number, when) for number in range(len(operations)) for when in ("before", "after")]
    return found + [(number, "torn") for number, name in enumerate(operations) if name == "write"]


def forked(job: Job, memory: memoryview, links: Links, faults: Faults) -> int:
    """Start a writer as a fork of this process. Returns its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with faults.installed():
                perform(job, memory, links)
            code = 0
        except CheckpointError:
            code = FAILED
        except BaseException:  # whatever it is must not go on into the tests
            traceback.print_exc()
        os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepared(folder: Path, kind: str, world: int = 1) -> Path:
    """A folder with a checkpoint of step 0, and where the one of step 1 is to go."""
    save(numbered_path(folder, 0), 0, world)
    return numbered_path(folder, 0 if kind == "overwritten" else 1)


def options_of(kind: str, folder: Path) -> dict[str, Any]:
    return {"prune": {"folder": str(folder), "total_limit": 1, "keep": []}} if kind == "pruned" else {}


def check_what_is_left(folder: Path, final: Path, world: int = 1) -> int:
    """After the run is gone. Which checkpoint is the latest; the next run goes on from it, and clears up."""
    latest = latest_checkpoint(folder)
    outcome = saved_step(latest, world)
    assert outcome in (0, 1)
    if outcome == 1:
        assert latest == final
    save(numbered_path(folder, next_number(folder)), 2, world)
    assert saved_step(latest_checkpoint(folder), world) == 2
    save(final, 3, world)
    assert saved_step(final, world) == 3
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []
    return outcome


@pytest.mark.parametrize("kind", ["new", "overwritten", "pruned"])
def test_an_end_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, kind: str, dead: int) -> None:
    final = prepared(tmp_path / "count", kind)
    job, memory = job_of(final, staging_of(final).begin(dead), 1, **options_of(kind, tmp_path / "count"))
    with Faults().installed() as operations:
        perform(job, memory, QUIET)
    assert operations.count("rename") == {"new": 1, "overwritten": 3, "pruned": 2}[kind]
    commit = [number for number, name in enumerate(operations) if name == "rename"][kind == "overwritten"]
    for number, (at, when) in enumerate(points(operations)):
        folder = tmp_path / str(number)
        final = prepared(folder, kind)
        job, memory = job_of(final, staging_of(final).begin(dead), 1, **options_of(kind, folder))
        assert ended(forked(job, memory, QUIET, Faults(at, when, lambda: os._exit(CRASH)))) == CRASH
        outcome = check_what_is_left(folder, final)
        assert outcome == (at > commit or (at == commit and when == "after")), (at, when)


def jobs_of_two(final: Path, pid: int) -> list[tuple[Job, memoryview]]:
    token = staging_of(final).begin(pid)
    return [job_of(final, token, 1, rank=rank, world=2) for rank in range(2)]


def counted_of_two(final: Path) -> list[list[str]]:
    """What the writers of two ranks do to the disk."""
    operations: list[list[str]] = [[], []]
    for job, memory in jobs_of_two(final, os.getpid())[::-1]:
        with Faults().installed() as operations[job.rank]:
            perform(job, memory, QUIET)
    return operations


@pytest.mark.parametrize("kind", ["new", "overwritten"])
def test_an_end_of_the_main_process_of_two_anywhere(tmp_path: Path, kind: str, dead: int) -> None:
    operations = counted_of_two(prepared(tmp_path / "count", kind, 2))[0]
    # What comes before the commit is the same for both kinds.
    first = operations.index("rename") if kind == "overwritten" else 0
    outcomes = set()
    for number, (at, when) in enumerate(points(operations)):
        if at < first:
            continue
        folder = tmp_path / str(number)
        final = prepared(folder, kind, 2)
        (main, memory), (other, others_memory) = jobs_of_two(final, dead)
        struck = forked(main, memory, QUIET, Faults(at, when, lambda: os._exit(CRASH)))
        spared = forked(other, others_memory, QUIET, Faults())
        assert (ended(struck), ended(spared)) == (CRASH, 0)
        outcomes.add(check_what_is_left(folder, final, 2))
    assert outcomes == {0, 1}


def test_an_end_of_the_other_of_two_anywhere(tmp_path: Path, dead: int) -> None:
    operations = counted_of_two(prepared(tmp_path / "count", "new", 2))[1]
    for number, (at, when) in enumerate(points(operations)):
        folder = tmp_path / str(number)
        final = prepared(folder, "new", 2)
        (main, memory), (other, others_memory) = jobs_of_two(final, dead)
        struck = forked(other, others_memory, QUIET, Faults(at, when, lambda: os._exit(CRASH)))
        assert ended(struck) == CRASH
        spared = forked(main, memory, ORPHANED, Faults())
        # The main process's writer commits by itself once the other has left all of its receipt.
        whole = (at, when) == (len(operations) - 1, "after")
        assert ended(spared) == (0 if whole else FAILED), (at, when)
        assert check_what_is_left(folder, final, 2) == whole


# Disks that take no more


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, rank: int) -> None:
    with small_disk(tmp_path / "disk") as disk:
        final = prepared(disk, "new", 2)
        token = staging_of(final).begin(os.getpid())
        job, memory = job_of(final, token, 1, rank=rank, world=2)
        large = bytes(400_000)
        job = replace(job, files=[*job.files, ("large.safetensors", [(len(memory), len(memory) + len(large))])])
        with pytest.raises(CheckpointError, match=rf"rank {rank}: OSError: .*No space left.*earlier ones are untouc"):
            perform(job, memoryview(bytes(memory) + large), QUIET)
        assert saved_step(latest_checkpoint(disk), 2) == 0
        if rank == 0:
            assert os.listdir(disk) == ["checkpoint_0"]
            return
        # There was no room for a receipt either, so the run has to tell the main process's writer.
        assert not Path(token, ".receipt_1").exists() or not Path(token, ".receipt_1").read_bytes().endswith(b"}")
        job, memory = job_of(final, token, 1, world=2)
        with pytest.raises(CheckpointError, match=r"rank 0: OSError: .*No space left|another rank could not write"):
            perform(job, memory, GIVEN_UP)
        assert os.listdir(disk) == ["checkpoint_0"]


def test_a_disk_that_cannot_be_written_keeps_what_was_saved(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, Process.open(ProcessSettings(device="cpu")) as process:
        final = prepared(disk, "new")
        job, memory = job_of(final, staging_of(final).begin(os.getpid()), 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match=r"rank 0: OSError: .*Read-only file system.*earlier ones are untou"):
            perform(job, memory, QUIET)
        saver = BackgroundSaver(process)
        with pytest.raises(CheckpointError, match=r"could not begin the checkpoint \(OSError: .*Read-only file system"):
            saver.save(final, items_of(0, 1), step=1, strategy="any")
        assert saved_step(latest_checkpoint(disk)) == 0
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        saver.save(final, items_of(0, 1), step=1, strategy="any").wait()
        assert saved_step(latest_checkpoint(disk)) == 1
        saver.close()


@pytest.mark.parametrize("kind", ["new", "overwritten", "pruned"])
def test_an_error_anywhere_is_told_and_keeps_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    final = prepared(tmp_path / "count", kind)
    job, memory = job_of(final, staging_of(final).begin(os.getpid()), 1, **options_of(kind, tmp_path / "count"))
    with Faults().installed() as operations:
        perform(job, memory, QUIET)
    for number, name in enumerate(operations):
        folder = tmp_path / str(number)
        final = prepared(folder, kind)
        job, memory = job_of(final, staging_of(final).begin(os.getpid()), 1, **options_of(kind, folder))
        told = None
        with Faults(number, "before", full).installed():
            try:
                perform(job, memory, QUIET)
            except CheckpointError as error:
                told = str(error)
        # What is only cleared up after the commit is left for the next time.
        assert name in ("unlink", "rmdir") or "No space left" in str(told), (number, name, told)
        assert saved_step(latest_checkpoint(folder)) in (0, 1)
        assert [each for each in os.listdir(folder) if ".tmp-" in each] == []
        save(final, 2)
        assert saved_step(final) == 2
        assert [each for each in os.listdir(folder) if each.startswith(".")] == []


def broken(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


def written_but(word: str) -> Callable[..., Any]:
    write = LocalFolder.write

    def refuse(folder: LocalFolder, name: str, chunks: Any, *, sync: bool) -> Any:
        return broken() if word in name else write(folder, name, chunks, sync=sync)

    return refuse


def test_a_receipt_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    final = prepared(tmp_path, "new", 2)
    _, (job, memory), receipt = two(final)
    with (
        patch.object(LocalFolder, "write", written_but("receipt")),
        pytest.raises(CheckpointError, match=r"\(rank 1: OSError: .*Input/output error\)"),
    ):
        perform(job, memory, QUIET)
    assert not receipt.exists()


def test_a_receipt_that_cannot_be_removed_is_told(tmp_path: Path) -> None:
    main, other, _ = two(prepared(tmp_path, "new", 2))
    perform(*other, QUIET)
    with (
        patch.object(Path, "unlink", broken),
        pytest.raises(CheckpointError, match=r"\(OSError: .*Input/output error\)"),
    ):
        perform(*main, QUIET)
    assert saved_step(latest_checkpoint(tmp_path), 2) == 0
    assert os.listdir(tmp_path) == ["checkpoint_0"]


# Receipts


def two(final: Path) -> tuple[tuple[Job, memoryview], tuple[Job, memoryview], Path]:
    """Jobs of the main process and of another, and what the latter's receipt is called."""
    main, other = jobs_of_two(final, os.getpid())
    return main, other, Path(main[0].token, ".receipt_1")


def test_the_main_process_waits_for_the_whole_of_a_receipt(tmp_path: Path) -> None:
    final = prepared(tmp_path, "new", 2)
    main, other, receipt = two(final)
    perform(*other, QUIET)
    text = receipt.read_bytes()
    parts = [b"", text[:1], text[: len(text) // 2], text[:-1], text]
    asked = 0

    def given_up() -> bool:
        nonlocal asked
        asked += 1
        receipt.write_bytes(parts[min(asked, len(parts) - 1)])
        return False

    receipt.write_bytes(parts[0])
    perform(*main, Links(lambda _: None, given_up, lambda: False))
    assert asked == len(parts) - 1
    assert saved_step(final, 2) == 1


def test_a_rank_that_failed_fails_the_checkpoint_and_is_named(tmp_path: Path) -> None:
    final = prepared(tmp_path, "new", 2)
    main, (job, memory), receipt = two(final)
    job = replace(job, files=[*job.files, job.files[0]])  # a file of that name is there already
    with pytest.raises(CheckpointError, match=r"rank 1: FileExistsError"):
        perform(job, memory, QUIET)
    assert "rank 1: FileExistsError" in json.loads(receipt.read_text())["problem"]
    with pytest.raises(CheckpointError, match=r"\(rank 1: FileExistsError.*earlier ones are untouched"):
        perform(*main, QUIET)
    assert os.listdir(tmp_path) == ["checkpoint_0"]


def test_an_item_of_two_ranks_fails_the_checkpoint(tmp_path: Path) -> None:
    final = prepared(tmp_path, "new", 2)
    main, (job, memory), _ = two(final)
    perform(replace(job, items={**job.items, "model": job.items["rng_1"]}), memory, QUIET)
    with pytest.raises(CheckpointError, match=r"Rank 1 and another both saved an item called \['model'\]"):
        perform(*main, QUIET)
    assert os.listdir(tmp_path) == ["checkpoint_0"]


@pytest.mark.parametrize(
    ("links", "message"),
    [
        (GIVEN_UP, "another rank could not write its part"),
        (ORPHANED, "the run ended, and rank 1 had not written its part"),
    ],
)
def test_the_main_process_does_not_wait_for_what_will_not_come(tmp_path: Path, links: Links, message: str) -> None:
    final = prepared(tmp_path, "new", 2)
    main, _, _ = two(final)
    with (
        patch.object(writer_module, "_ORPHAN_WAIT_S", 0.1),
        pytest.raises(CheckpointError, match=rf"\({message}\), and nothing of it was kept"),
    ):
        perform(*main, links)
    assert os.listdir(tmp_path) == ["checkpoint_0"]


def test_a_checkpoint_whose_run_is_gone_is_completed(tmp_path: Path) -> None:
    final = prepared(tmp_path, "new", 2)
    main, other, _ = two(final)
    perform(*other, ORPHANED)
    perform(*main, ORPHANED)
    assert saved_step(final, 2) == 1


def test_a_name_that_another_run_took_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    final = prepared(tmp_path, "new")
    job, memory = job_of(final, staging_of(final).begin(os.getpid()), 1)
    save(final, 7)
    with pytest.raises(CheckpointError, match="another run has taken its name, and what that wrote may be newer"):
        perform(job, memory, QUIET)
    assert saved_step(final) == 7
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_0", "checkpoint_1"]
    # What was there when the save began is replaced.
    job, memory = job_of(final, staging_of(final).begin(os.getpid()), 8)
    assert not job.is_new
    perform(job, memory, QUIET)
    assert saved_step(final) == 8
    assert not previous_path(final).exists()


def test_an_old_checkpoint_that_stays_is_told(tmp_path: Path) -> None:
    final = prepared(tmp_path, "new")
    job, memory = job_of(final, staging_of(final).begin(os.getpid()), 1, **options_of("pruned", tmp_path))
    refuse = patch.object(LocalShelf, "prune", side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with refuse, pytest.raises(CheckpointError, match=r"`.*checkpoint_1` is complete, but an old one could not be rem"):
        perform(job, memory, QUIET)
    assert saved_step(latest_checkpoint(tmp_path)) == 1


# A run that begins while a writer of one that is gone still writes


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_new_run_that_clears_up_does_not_break_what_an_old_one_is_completing(
    tmp_path: Path, dead: int, at: int
) -> None:
    final = prepared(tmp_path, "new")
    job, memory = job_of(final, staging_of(final).begin(dead), 1)
    staging = staging_of(final)
    files = writer_module._written(staging.folder(job.token), job, memory)
    unlink, seen = os.unlink, 0

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == at + 1:
            # The writer outlived its run, and completes what another run is clearing up.
            with suppress(CheckpointError):
                writer_module._commit(staging, job, files, ORPHANED)
        unlink(*args, **kwargs)

    with patch.object(os, "unlink", meanwhile):
        staging_of(numbered_path(tmp_path, 2)).begin(os.getpid())
    assert seen > at
    assert saved_step(latest_checkpoint(tmp_path)) in (0, 1)


def test_what_a_writer_is_still_at_is_left_alone(tmp_path: Path, dead: int) -> None:
    """Its run is gone, and it goes on: in another process, as it is, a lock is seen."""
    final = prepared(tmp_path, "new")
    token = staging_of(final).begin(dead)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with staging_of(final).hold(token):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    other = staging_of(numbered_path(tmp_path, 7))
    other.abandon(other.begin(os.getpid()))
    kept = Path(token).is_dir()
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    for descriptor in (*ready, *go):
        os.close(descriptor)
    other.abandon(other.begin(os.getpid()))
    assert (kept, Path(token).is_dir()) == (True, False)


# As a process


def test_a_writer_loads_no_torch() -> None:
    code = "import sys, accel_parallel.checkpoint.writer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
