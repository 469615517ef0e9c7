"""`accel checkpoint verify`: every file proved to be what was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from accel_parallel.checkpoint.folder import File, Folder
from accel_parallel.checkpoint.location import is_remote
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, Manifest
from accel_parallel.checkpoint_commands.arguments import Arguments, whole_number
from accel_parallel.checkpoint_commands.places import find_checkpoint
from accel_parallel.checkpoint_commands.progress import bytes_bar
from accel_parallel.checkpoint_commands.text import size_text
from accel_state.errors import CheckpointError

__all__ = ["main"]

_NOTES = """\
Reads all bytes of all files and compares their checksums with the manifest's, which has one of itself. Names every
bad file, not the first alone, and files that the manifest does not know, which are no damage.

Exit code 0: all are as written. 1: at least one is not.

examples
  accel checkpoint verify runs/7b                    the latest one of a run
  accel checkpoint verify runs/7b/checkpoints/checkpoint_* --jobs 16"""


def main(argv: Sequence[str]) -> int:
    """Prove them."""
    arguments = Arguments("verify", notes=_NOTES)
    arguments.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders of checkpoints")
    arguments.add_argument("--jobs", type=whole_number(1), default=4, metavar="N", help="files read at once; 4")
    options = arguments.read(argv)
    if options is None:
        return 0
    folders = [find_checkpoint(location) for location in options.checkpoints]
    outcomes = [_prove(folder, options.jobs) for folder in folders]
    return 0 if all(outcomes) else 1


def _prove(folder: Folder, jobs: int) -> bool:
    """Whether all is well; prints what is not."""
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        print(f"{folder.location}: BAD\n  {error}")
        return False
    names = sorted(manifest.files, key=lambda name: -manifest.files[name].size_bytes)
    total = sum(each.size_bytes for each in manifest.files.values())
    with bytes_bar(total, "verify") as step, ThreadPoolExecutor(jobs) as pool:
        watched = cast(Folder, _Watched(folder, step))
        running = [pool.submit(_problem, manifest, watched, name) for name in names]
        try:
            problems = [problem for each in running if (problem := each.result()) is not None]
        except BaseException:  # an interrupt: what has not begun must not be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    outcome = f"BAD, {len(problems)} of {len(names)} files" if problems else f"{len(names)} files as written"
    print(f"{folder.location}: {outcome}, {size_text(total)}")
    for problem in problems:
        print(f"  {problem}")
    unknown = _unknown(folder, manifest)
    if unknown:
        print(f"  also there, and not of the checkpoint: {', '.join(unknown)}")
    return not problems


def _problem(manifest: Manifest, folder: Folder, name: str) -> str | None:
    try:
        manifest.verify(folder, name)
    except CheckpointError as error:
        return str(error)
    return None


def _unknown(folder: Folder, manifest: Manifest) -> list[str]:
    if is_remote(folder.location):  # where files of other saves lie beside those that the manifest means
        return []
    return sorted(set(os.listdir(folder.location)) - set(manifest.files) - {MANIFEST_NAME})


class _Watched:
    """A folder whose files tell how far they have been read."""

    def __init__(self, folder: Folder, step: Callable[[int], None]) -> None:
        self._folder, self._step = folder, step

    def open(self, name: str) -> File:
        return _WatchedFile(self._folder.open(name), self._step)

    def below(self, place: str) -> Folder:
        return cast(Folder, _Watched(self._folder.below(place), self._step))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._folder, name)


@dataclass(frozen=True, slots=True)
class _WatchedFile:
    file: File
    step: Callable[[int], None]

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    def view(self, begin: int, end: int) -> memoryview:
        return self.file.view(begin, end)

    def chunks(self) -> Iterator[memoryview]:
        for chunk in self.file.chunks():
            yield chunk
            self.step(len(chunk))
