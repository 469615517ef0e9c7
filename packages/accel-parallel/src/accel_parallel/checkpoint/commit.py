"""Writing a checkpoint so that no crash leaves half of one: a temporary folder, a manifest, one rename.

Order of events, the reason that it is safe:

1. The main process makes ``.<name>.tmp-...`` beside the final folder. Nobody reads such names.
2. Every rank writes its items there and flushes each file to the disk.
3. The main process learns of every rank's files or failure. On a failure it removes the temporary folder, and every
   rank raises the same error; what was saved before is untouched.
4. It writes the manifest, flushes it and the folder, and renames the folder to its final name: the commit.
5. It flushes the parent folder, and all ranks meet. Only then may older checkpoints be removed.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accel_parallel.checkpoint.layout import previous_path, recover
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, FileRecord, ItemRecord, Manifest
from accel_parallel.checkpoint.store import Item, sync_to_disk, write_item
from accel_state.collectives import broadcast_object_list, gather_object
from accel_state.errors import CheckpointError
from accel_state.process import Process

__all__ = ["save_checkpoint"]

_LIBRARIES = ("accel", "accel-state", "accel-parallel", "torch", "safetensors")
_Written = tuple[dict[str, ItemRecord], dict[str, FileRecord]]


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
    temporary = Path(_on_main(process, lambda: str(_begin(final))))
    answers: list[tuple[int, _Written, str | None]] = gather_object(
        [(process.topology.rank, *_write(temporary, items))], process=process
    )
    failures = [f"rank {rank}: {error}" for rank, _, error in answers if error is not None]
    if failures:
        if process.topology.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        process.barrier()
        raise CheckpointError(
            f"The checkpoint `{final}` could not be written ({'; '.join(failures)}), and nothing of it was kept; "
            "earlier "
            f"ones are untouched. Make room or choose another `project_dir`, then save again."
        )
    _on_main(process, lambda: _finish(temporary, final, _merge(answers), process, step, strategy))
    return final


def _on_main(process: Process, action: Callable[[], object]) -> str:
    """Run on the main process, and let every rank know how it ended. Every rank must call this."""
    outcome: list[tuple[str, str | None]] = [("", None)]
    if process.topology.is_main:
        try:
            outcome = [(str(action()), None)]
        except (OSError, CheckpointError) as error:
            outcome = [("", f"{type(error).__name__}: {error}")]
    answer, failure = broadcast_object_list(outcome, process=process)[0]
    if failure is not None:
        raise CheckpointError(
            f"The main process could not commit the checkpoint ({failure}); earlier ones are untouched. "
            f"Correct that, or choose another `project_dir`, then save again."
        )
    return str(answer)


def _write(temporary: Path, items: Sequence[Item]) -> tuple[_Written, str | None]:
    records: dict[str, ItemRecord] = {}
    files: dict[str, FileRecord] = {}
    try:
        for item in items:
            records[item.name], written = write_item(temporary, item)
            files.update(written)
    except (OSError, CheckpointError) as error:
        return ({}, {}), f"{type(error).__name__}: {error}"
    return (records, files), None


def _merge(answers: Sequence[tuple[int, _Written, str | None]]) -> _Written:
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
    _remove_leftovers(final.parent)
    recover(final)
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
    try:
        (temporary / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        sync_to_disk(temporary / MANIFEST_NAME)
        sync_to_disk(temporary)
        _publish(temporary, final)
        sync_to_disk(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, final: Path) -> None:
    if not final.exists():
        temporary.rename(final)
        return
    if not (final / MANIFEST_NAME).is_file():
        final.rmdir()  # it was seen to be empty
        temporary.rename(final)
        return
    # A folder with contents cannot be replaced in one step everywhere. Between these two renames the old checkpoint
    # waits, complete, under the name that `recover` looks for.
    previous = previous_path(final)
    final.rename(previous)
    temporary.rename(final)
    shutil.rmtree(previous)


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of processes of this host that are gone, and half-removed checkpoints."""
    for path in folder.glob(".*.tmp-*"):
        match = re.fullmatch(r"\..*\.tmp-(.+)-(\d+)-[0-9a-f]{8}", path.name)
        if match and match[1] == _host() and not _lives(int(match[2])):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".checkpoint_*.removed"):
        shutil.rmtree(path, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    return platform.node() or "localhost"


def _versions() -> Mapping[str, str]:
    return {name: found for name in _LIBRARIES if (found := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout by PYTHONPATH, or the leaf alone
        return None
