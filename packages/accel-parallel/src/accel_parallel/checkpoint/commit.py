"""Writing a checkpoint so that no crash leaves half of one: a temporary folder, a manifest, one rename.

Order of events, the reason that it is safe:

1. The main process makes ``.<name>.tmp-...`` beside the final folder. Nobody reads such names.
2. Every rank writes its items there and flushes each file to the disk.
3. The main process learns of every rank's files or failure. On a failure it removes the temporary folder, and every
   rank raises the same error; what was saved before is untouched.
4. It writes the manifest, flushes it and the folder, and renames the folder to its final name: the commit.
5. It flushes the parent folder, and all ranks meet. Only then may older checkpoints be removed.

A folder with contents cannot be replaced by one rename everywhere. So where a checkpoint of that name is there, it
first steps aside as ``.<name>.previous``; between the two renames it waits there, complete, for `recover`.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accel_parallel.checkpoint.layout import discard, previous_path, recover, remove_tree
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, FileRecord, ItemRecord, Manifest
from accel_parallel.checkpoint.store import Item, sync_to_disk, write_item
from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import CheckpointError
from accel_state.process import Process

__all__ = ["save_checkpoint"]

_LIBRARIES = ("accel", "accel-state", "accel-parallel", "torch", "safetensors")
_Written = tuple[dict[str, ItemRecord], dict[str, FileRecord]]
_Answer = tuple[int, _Written, str | None]

_FAILURES = (OSError, CheckpointError, RuntimeError, TypeError, ValueError, MemoryError)
"""What writing may raise, devices and odd states included. A rank that left with any of these instead of reporting it
would keep its peers waiting."""


def save_checkpoint(final: Path, items: Sequence[Item], *, process: Process, step: int, strategy: str) -> Path:
    """Write a checkpoint. Every rank must call this, each with the items that it owns.

    Args:
        final: folder to end up in; a complete checkpoint there is replaced once the new one is complete.
        items: this rank's items. Names are unique over all ranks.
        process: the open process.
        step: optimizer steps taken, for the manifest.
        strategy: name of the strategy, for the manifest.

    Raises:
        CheckpointError: on every rank, if any could not write; the error names the rank and the reason.
    """
    if final.is_symlink():
        final = final.resolve()  # what the link names is replaced, on the disk where it lies, and the link stays
    temporary = Path(_on_main(process, lambda: str(_begin(final))))
    try:
        answers: list[_Answer] = gather_object([(process.topology.rank, *_write(temporary, items))], process=process)
        _raise_failures(answers, temporary, final, process)
        _on_main(process, lambda: _finish(temporary, final, _merge(answers), process, step, strategy))
    finally:
        if process.topology.is_main:  # interrupted, or a peer died; after the commit there is no such folder
            remove_tree(temporary)
    return final


def _raise_failures(answers: Sequence[_Answer], temporary: Path, final: Path, process: Process) -> None:
    failures = [f"rank {rank}: {error}" for rank, _, error in answers if error is not None]
    if not failures:
        return
    if process.topology.is_main:
        remove_tree(temporary)
    process.barrier()
    raise CheckpointError(
        f"The checkpoint `{final}` could not be written ({'; '.join(failures)}), and nothing of it was kept; earlier "
        f"ones are untouched. Correct what is named there, or choose another folder, then save again."
    )


def _on_main(process: Process, action: Callable[[], object]) -> str:
    """Run on the main process, and let every rank know how it ended. Every rank must call this."""
    outcome: list[tuple[str, str | None]] = [("", None)]
    if process.topology.is_main:
        try:
            outcome = [(str(action()), None)]
        except _FAILURES as error:
            outcome = [("", f"{type(error).__name__}: {error}")]
    answer, failure = broadcast_object_list(outcome, process=process)[0]
    if failure is not None:
        raise CheckpointError(
            f"The main process could not commit the checkpoint ({failure}); earlier ones are untouched. "
            f"Correct that, or choose another folder, then save again."
        )
    return str(answer)


def _write(temporary: Path, items: Sequence[Item]) -> tuple[_Written, str | None]:
    records: dict[str, ItemRecord] = {}
    files: dict[str, FileRecord] = {}
    try:
        for item in items:
            if item.name in records:
                raise CheckpointError(f"Two items are called `{item.name}`. Give each item a name of its own.")
            records[item.name], written = write_item(temporary, item)
            files.update(written)
    except _FAILURES as error:
        return ({}, {}), f"{type(error).__name__}: {error}"
    return (records, files), None


def _merge(answers: Sequence[_Answer]) -> _Written:
    items: dict[str, ItemRecord] = {}
    files: dict[str, FileRecord] = {}
    for rank, (records, written), _ in answers:
        twice = sorted(items.keys() & records.keys())
        if twice:
            raise CheckpointError(
                f"Rank {rank} and another both saved an item called {twice}. Give each item one owner."
            )
        items.update(records)
        files.update(written)
    return items, files


def _begin(final: Path) -> Path:
    if final.exists() and not (final / MANIFEST_NAME).is_file() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(
            f"`{final}` exists and is no checkpoint, and writing one there would destroy it. Name another folder."
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final)
    _remove_leftovers(final)
    temporary = final.with_name(f".{final.name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir()
    return temporary


def _finish(temporary: Path, final: Path, written: _Written, process: Process, step: int, strategy: str) -> None:
    items, files = written
    manifest = Manifest(
        step=step,
        world_size=process.topology.world_size,
        strategy=strategy,
        libraries=_versions(),
        items=items,
        files=files,
    )
    (temporary / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    sync_to_disk(temporary / MANIFEST_NAME)
    sync_to_disk(temporary)
    _publish(temporary, final)


def _publish(temporary: Path, final: Path) -> None:
    """Let the new checkpoint take its name, for good. Only afterwards the one that it replaces may go."""
    if not (final / MANIFEST_NAME).is_file():
        temporary.rename(final)  # nothing is there, or an empty folder
        sync_to_disk(final.parent)
        return
    previous = previous_path(final)
    final.rename(previous)
    try:
        temporary.rename(final)
    finally:
        if not final.exists():  # refused or interrupted
            previous.rename(final)
    sync_to_disk(final.parent)
    discard(previous)


def _remove_leftovers(final: Path) -> None:
    """Remove temporary folders of processes of this host that are gone, and half-removed checkpoints."""
    for path in final.parent.glob(".*.tmp-*"):
        match = re.fullmatch(r"\..*\.tmp-(.+)-([0-9]+)-[0-9a-f]{8}", path.name)
        if match and match[1] == _host() and not _lives(int(match[2])):
            remove_tree(path)
    for path in final.parent.glob(".checkpoint_*.removed"):
        remove_tree(path)
    remove_tree(final.with_name(f".{final.name}.previous.removed"))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    """This host, and this container where it numbers its processes apart: elsewhere a number says nothing."""
    namespace = Path("/proc/self/ns/pid")
    apart = f"-{namespace.stat().st_ino}" if namespace.exists() else ""
    return f"{platform.node() or 'localhost'}{apart}"


def _versions() -> Mapping[str, str]:
    return {name: found for name in _LIBRARIES if (found := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout by PYTHONPATH, or the leaf alone
        return None
