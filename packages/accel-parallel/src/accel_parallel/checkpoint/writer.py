"""The process that writes one rank's files of one save while the rank trains on, and commits.

It is given ranges of memory that it shares with the rank, and needs nothing else of it: a rank that dies meanwhile does
not take the checkpoint with it. Ranks learn of one another by receipts: each writer leaves a file beside those that it
wrote, and the main process's writer commits once all are there. So no collective runs beside those of training.

Imports no torch: it starts in a twentieth of a second and holds little memory.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from accel_parallel.checkpoint.folder import FileRecord, Folder
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, About, ItemRecord
from accel_parallel.checkpoint.shelf import shelf_of
from accel_parallel.checkpoint.staging import FAILURES, Staging, staging_of
from accel_state.errors import CheckpointError

__all__ = ["IGNORED", "Job", "perform", "run"]

IGNORED = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals that reach the whole group and are for the run, which waits for its writer where it heeds them."""
_NUM_THREADS = 4
_ORPHAN_WAIT_S = 60.0
"""How long the main process's writer waits for others once the run that it belongs to is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one rank contributes to one checkpoint, as JSON can hold it."""

    location: str
    """Of the checkpoint."""
    token: str
    """Of its staging."""
    is_new: bool
    """Whether nothing of that name was there when it began; nothing is replaced then."""
    rank: int
    world_size: int
    sync: bool
    items: Mapping[str, Any]
    """Records of this rank's items."""
    files: Sequence[tuple[str, Sequence[tuple[int, int]]]]
    """Names, and the ranges of the shared memory that each consists of."""
    about: Mapping[str, Any] | None = None
    """For the manifest; main process only."""
    prune: Mapping[str, Any] = field(default_factory=dict)
    """``folder``, ``total_limit`` and ``keep``, where older checkpoints go afterwards; main process only."""


@dataclass(frozen=True, slots=True)
class Links:
    """How a writer hears of the run that it belongs to, and tells it what it has done."""

    told: Callable[[str], None]
    """Called with ``"written"``."""
    given_up: Callable[[], bool]
    """Whether the run wants the save no more, since a part of it failed elsewhere."""
    orphaned: Callable[[], bool]
    """Whether the run is gone."""


def perform(job: Job, memory: memoryview, links: Links) -> None:
    """Write this rank's files, and commit where it is the main process's.

    Raises:
        CheckpointError: if this rank's files could not be written, or the checkpoint could not be committed.
    """
    staging = staging_of(job.location)
    with staging.hold(job.token):
        _perform(staging, job, memory, links)
    if job.about is not None:
        _prune(job)


def _perform(staging: Staging, job: Job, memory: memoryview, links: Links) -> None:
    folder = staging.folder(job.token)
    files: dict[str, FileRecord] = {}
    problem = None
    try:
        files = _written(folder, job, memory)
    except FAILURES as error:
        problem = f"rank {job.rank}: {_said(error)}"
    if job.about is None:
        _leave_receipt(folder, job, files, problem)
        links.told("written")
        return
    try:
        if problem is not None:
            raise CheckpointError(_could_not(job, problem))
        links.told("written")
        _commit(staging, job, files, links)
    except OSError as error:
        raise CheckpointError(_could_not(job, _said(error))) from error
    finally:
        staging.abandon(job.token)


def _written(folder: Folder, job: Job, memory: memoryview) -> dict[str, FileRecord]:
    def write(name: str, ranges: Sequence[tuple[int, int]]) -> FileRecord:
        return folder.write(name, (memory[begin:end] for begin, end in ranges), sync=job.sync)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        running = {name: pool.submit(write, name, ranges) for name, ranges in job.files}
    return {name: future.result() for name, future in running.items()}


def _leave_receipt(folder: Folder, job: Job, files: Mapping[str, FileRecord], problem: str | None) -> None:
    """Tell the main process's writer what this rank wrote, or that it could not; then raise the same here."""
    records = {name: asdict(record) for name, record in files.items()}
    receipt = {"items": job.items, "files": records, "problem": problem}
    try:
        folder.write(_receipt_of(job.rank), [json.dumps(receipt).encode()], sync=False)
    except FAILURES as error:
        # Such as a full disk: this rank tells its own run, which tells the main process.
        problem = problem or f"rank {job.rank}: {_said(error)}"
    if problem is not None:
        raise CheckpointError(_could_not(job, problem))


def _receipt_of(rank: int) -> str:
    return f".receipt_{rank}"


def _commit(staging: Staging, job: Job, files: dict[str, FileRecord], links: Links) -> None:
    items = {name: _item(record) for name, record in job.items.items()}
    folder = staging.folder(job.token)
    for rank, receipt in _receipts(folder, job, links):
        if receipt["problem"] is not None:
            raise CheckpointError(_could_not(job, receipt["problem"]))
        twice = sorted(items.keys() & receipt["items"].keys())
        if twice:
            raise CheckpointError(f"Rank {rank} and another both saved an item called {twice}. Give each one owner.")
        items.update({name: _item(record) for name, record in receipt["items"].items()})
        files.update({name: FileRecord(**record) for name, record in receipt["files"].items()})
        staging.remove(job.token, _receipt_of(rank))
    if job.is_new and staging.folder(job.location).holds(MANIFEST_NAME):
        raise CheckpointError(
            _could_not(job, "another run has taken its name, and what that wrote may be newer; let each have a folder")
        )
    assert job.about is not None
    try:
        staging.publish(job.token, About(**job.about).manifest_of(items, files).to_json(), sync=job.sync)
    except FAILURES as error:
        raise CheckpointError(_could_not(job, _said(error))) from error


def _receipts(folder: Folder, job: Job, links: Links) -> Iterator[tuple[int, Any]]:
    """What each other rank's writer left, in the order of ranks."""
    pause, since = 0.005, None
    for rank in range(1, job.world_size):
        while (receipt := _read_receipt(folder, rank)) is None:
            if links.given_up():
                raise CheckpointError(_could_not(job, "another rank could not write its part"))
            since = (since or time.monotonic()) if links.orphaned() else None
            if since is not None and time.monotonic() - since > _ORPHAN_WAIT_S:
                raise CheckpointError(_could_not(job, f"the run ended, and rank {rank} had not written its part"))
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        yield rank, receipt


def _read_receipt(folder: Folder, rank: int) -> Any:
    if not folder.holds(_receipt_of(rank)):
        return None
    try:
        file = folder.open(_receipt_of(rank))
        return json.loads(bytes(file.view(0, file.size_bytes)))
    except (OSError, ValueError):  # not all of it is there yet
        return None


def _item(record: Mapping[str, Any]) -> ItemRecord:
    return ItemRecord(record["kind"], tuple(record["files"]), record["aliases"], record["of"])


def _prune(job: Job) -> None:
    if not job.prune:
        return
    limit, folder = job.prune["total_limit"], job.prune["folder"]
    try:
        shelf_of(folder).prune(total_limit=limit, keep=job.prune["keep"])
    except FAILURES as error:
        raise CheckpointError(
            f"The checkpoint `{job.location}` is complete, but an old one could not be removed "
            f"({type(error).__name__}: {error}), and with `total_limit={limit}` the disk would fill up. Make "
            f"`{folder}` writable, or leave the limit out."
        ) from error


def _could_not(job: Job, problem: str) -> str:
    return (
        f"The checkpoint `{job.location}` could not be written ({problem}), and nothing of it was kept; earlier ones "
        f"are untouched. Correct what is named there, or choose another folder, then save again."
    )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# As a process of its own


def run(descriptor: int) -> int:
    """Do the job that is the first line of the standard input; its memory is the file `descriptor`.

    A further line gives the save up, and the end of the input says that the run is gone. What was done is told on the
    standard output: ``written``, then ``done`` or a line of JSON with what failed.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # they were blocked while this was starting
    values = json.loads(sys.stdin.readline())
    size = os.fstat(descriptor).st_size
    memory = memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b"")
    given_up, orphaned = threading.Event(), threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            given_up.set()
        orphaned.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        perform(Job(**values), memory, Links(_tell, given_up.is_set, orphaned.is_set))
    except CheckpointError as error:
        _tell(json.dumps(str(error)))
        return 1
    _tell("done")
    return 0


def _tell(word: str) -> None:
    try:
        print(word, flush=True)
    except BrokenPipeError:  # the run is gone; the checkpoint is not
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 # until this process ends
