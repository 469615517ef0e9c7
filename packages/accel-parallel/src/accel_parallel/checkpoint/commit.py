"""Writing a checkpoint so that no crash leaves half of one: a temporary folder, a manifest, one rename.

Order of events, the reason that it is safe:

1. Every rank takes its items apart; where one cannot, all raise, and nothing was written.
2. The main process makes ``.<name>.tmp-...`` beside the final folder. Nobody reads such names.
3. Every rank writes its files there and flushes each to the disk.
4. The main process learns of every rank's files or failure. On a failure it removes the temporary folder, and only
   then every rank raises the same error; what was saved before is untouched.
5. It writes the manifest, flushes it and the folder, and renames the folder to its final name: the commit.
6. It flushes the parent folder, and all ranks meet. Only then may older checkpoints be removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accel_parallel.checkpoint.folder import FileRecord, Folder
from accel_parallel.checkpoint.item import Item
from accel_parallel.checkpoint.manifest import About, ItemRecord
from accel_parallel.checkpoint.outgoing import Outgoing, OutgoingFile
from accel_parallel.checkpoint.staging import FAILURES, Staging, staging_of
from accel_parallel.checkpoint.store import NUM_THREADS
from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import CheckpointError, ConfigError
from accel_state.logging import get_logger
from accel_state.process import Process

__all__ = ["begin", "on_main", "prepare", "raise_failures", "save_checkpoint", "write_checkpoint"]

logger = get_logger(__name__)

_Path = TypeVar("_Path", bound="str | Path")
Written = tuple[dict[str, ItemRecord], dict[str, FileRecord]]


def save_checkpoint(
    final: _Path,
    items: Sequence[Item],
    *,
    process: Process,
    step: int,
    strategy: str,
    sync: bool = True,
    spread: bool = True,
) -> _Path:
    """Write a checkpoint. Every rank must call this, each with the items that it owns or shares.

    Args:
        final: folder, or URL of an object store, to end up in; a complete checkpoint there is replaced once the new one
            is complete.
        items: this rank's items. Names are unique over all ranks, but for shared items, which all ranks give.
        process: the open process.
        step: optimizer steps taken, for the manifest.
        strategy: name of the strategy, for the manifest.
        sync: whether files are flushed to the disk; an object store keeps what it has taken. Without it a crash of the
            machine, never one of the process, may leave a checkpoint whose files are empty or old; its checksums tell.
        spread: whether divided tensors are written by all ranks, or by the main process alone.

    Returns:
        The folder.

    Raises:
        CheckpointError: on every rank, if any could not write; the error names the rank and the reason.
    """
    staging = staging_of(final)
    outgoing = prepare(items, spread=spread, staging=staging, process=process)
    with begin(staging, process) as token:
        share = outgoing.share(process)
        written, problem = _write(staging.folder(token), share.files, sync=sync)
        raise_failures(problem, staging, token, process)
        answers = gather_object([(process.topology.rank, (share.records, written))], process=process)
        about = About.run(process, step=step, strategy=strategy)

        def publish() -> None:
            try:
                staging.publish(token, about.manifest_of(*_merge(answers)).to_json(), sync=sync)
            except BaseException:
                _clear_up(staging, token)  # before the others hear of it: they may look
                raise

        on_main(process, publish, "commit")
    return final


def write_checkpoint(
    final: _Path,
    items: Iterable[Item],
    *,
    about: About,
    sync: bool = True,
    progress: Callable[[int], None] | None = None,
) -> _Path:
    """Write a checkpoint from one process that is no run, such as one that converts another.

    Tensors may be `StoredTensor`; they are read one at a time.

    Args:
        final: folder to end up in; a complete checkpoint there is replaced once the new one is complete.
        items: what it is to hold, one after the other.
        about: for the manifest.
        sync: whether files are flushed to the disk.
        progress: called with the bytes of each file once it is written.

    Raises:
        CheckpointError: for a value that cannot be stored, or a folder that is something else.
        OSError: whatever the disk says; nothing is left then.
    """
    staging = staging_of(final)
    token = staging.begin(os.getpid())
    try:
        records: dict[str, ItemRecord] = {}
        files: dict[str, FileRecord] = {}
        for item in items:
            if item.name in records:
                raise CheckpointError(f"Two items are called `{item.name}`. Give each item a name of its own.")
            share = Outgoing([item]).alone()
            records.update(share.records)
            for file in share.files:
                files[file.name] = staging.folder(token).write(file.name, file.chunks(), sync=sync)
                if progress is not None:
                    progress(files[file.name].size_bytes)
        staging.publish(token, about.manifest_of(records, files).to_json(), sync=sync)
    finally:
        staging.abandon(token)
    return final


def prepare(items: Sequence[Item], *, spread: bool, staging: Staging, process: Process) -> Outgoing:
    """Every rank must call this. Take items apart, or raise on every rank where one of them cannot.

    Raises:
        CheckpointError: on every rank, naming the rank and the value.
    """
    if staging.in_process and process.topology.world_size > 1:
        raise ConfigError(
            f"`{staging.location}` is memory of one process, and this run has {process.topology.world_size}, none of "
            f"which would see all of the checkpoint. Give a folder or an object store that all of them reach."
        )
    outgoing, problem = None, None
    try:
        outgoing = Outgoing(items, spread=spread)
    except FAILURES as error:
        problem = _said(error)
    raise_failures(problem, staging, None, process)
    assert outgoing is not None
    return outgoing


@contextmanager
def begin(staging: Staging, process: Process) -> Iterator[str]:
    """Every rank must call this. Room for a checkpoint, which goes again unless it was published inside."""
    token = on_main(process, lambda: staging.begin(os.getpid()), "begin")
    try:
        yield token
    finally:
        if process.topology.is_main:  # a failure, an interrupt, or a peer that died
            _clear_up(staging, token)


def on_main(process: Process, action: Callable[[], object], what: str) -> str:
    """Run on the main process, and let every rank know how it ended. Every rank must call this."""
    outcome: list[tuple[str, str | None]] = [("", None)]
    if process.topology.is_main:
        try:
            outcome = [(str(action()), None)]
        except FAILURES as error:
            outcome = [("", _said(error))]
    answer, failure = broadcast_object_list(outcome, process=process)[0]
    if failure is not None:
        raise CheckpointError(
            f"The main process could not {what} the checkpoint ({failure}); earlier ones are untouched. "
            f"Correct that, or choose another folder, then save again."
        )
    return str(answer)


def _write(folder: Folder, files: Iterator[OutgoingFile], *, sync: bool) -> tuple[dict[str, FileRecord], str | None]:
    """Write several files at once. Runs through all of them whatever happens, since other ranks wait in between."""
    records: dict[str, FileRecord] = {}
    problem: str | None = None
    running: list[tuple[str, Future[FileRecord]]] = []

    def finish(most: int) -> None:
        nonlocal problem
        while len(running) > most:
            name, future = running.pop(0)
            try:
                records[name] = future.result()
            except FAILURES as error:
                problem = problem or _said(error)

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="checkpoint") as pool:
        for file in files:
            if problem is None:
                running.append((file.name, pool.submit(folder.write, file.name, file.chunks(), sync=sync)))
                finish(NUM_THREADS)
        finish(0)
    return records, problem


def _merge(answers: Sequence[tuple[int, Written]]) -> Written:
    items: dict[str, ItemRecord] = {}
    files: dict[str, FileRecord] = {}
    for rank, (records, written) in answers:
        twice = sorted(items.keys() & records.keys())
        if twice:
            raise CheckpointError(
                f"Rank {rank} and another both saved an item called {twice}. Give each item one owner."
            )
        items.update(records)
        files.update(written)
    return items, files


def raise_failures(problem: str | None, staging: Staging, token: str | None, process: Process) -> None:
    """Every rank must call this, with the problem that it met, if any. What was written under `token` goes first.

    Raises:
        CheckpointError: on every rank, if any met one; it names each of them and its problem.
    """
    found = gather_object([(process.topology.rank, problem)], process=process)
    failures = [f"rank {rank}: {problem}" for rank, problem in found if problem is not None]
    if not failures:
        return
    if token is not None:
        if process.topology.is_main:
            _clear_up(staging, token)  # before anybody raises, and may look
        process.barrier()
    raise CheckpointError(
        f"The checkpoint `{staging.location}` could not be written ({'; '.join(failures)}), and nothing of it was "
        f"kept; earlier ones are untouched. Correct what is named there, or choose another folder, then save again."
    )


def _clear_up(staging: Staging, token: str) -> None:
    """As far as possible: what failed first is what is raised, and this is told besides."""
    try:
        staging.abandon(token)
    except FAILURES as error:
        logger.warning(
            "What was written of the checkpoint `%s` could not be removed (%s), and still lies at `%s`. Remove it.",
            staging.location, _said(error), token,
        )  # fmt: skip


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
