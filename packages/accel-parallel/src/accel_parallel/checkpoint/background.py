"""Saves that go on while the run trains: a copy in host memory, and a process of its own that writes and commits it."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from accel_parallel.checkpoint.commit import on_main, prepare, raise_failures
from accel_parallel.checkpoint.host_buffer import HostBuffer
from accel_parallel.checkpoint.item import Item
from accel_parallel.checkpoint.manifest import MANIFEST_NAME, About
from accel_parallel.checkpoint.outgoing import OutgoingFile, Share, on_host
from accel_parallel.checkpoint.pending import PendingSave, Writer
from accel_parallel.checkpoint.staging import FAILURES, Staging, staging_of
from accel_parallel.checkpoint.tensor_file import StoredTensor
from accel_parallel.checkpoint.writer import IGNORED, Job, Links, perform
from accel_state.collectives import gather_object
from accel_state.errors import CheckpointError
from accel_state.process import Process

__all__ = ["BackgroundSaver"]

# Not the folder that it happens to be started in: a `json.py` there would be imported instead.
_CODE = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    "import json; sys.path[:] = json.loads(sys.argv[1]); "
    "from accel_parallel.checkpoint.writer import run; sys.exit(run(int(sys.argv[2])))"
)


class BackgroundSaver:
    """The saves of one run in the background, one at a time."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.pending: PendingSave | None = None
        """The last one that was begun."""
        self._buffer: HostBuffer | None = None

    def save(
        self,
        final: str | Path,
        items: Sequence[Item],
        *,
        step: int,
        strategy: str,
        sync: bool = True,
        spread: bool = True,
        prune: Mapping[str, Any] | None = None,
    ) -> PendingSave:
        """Copy everything to host memory, and let a process of its own write it. Every rank must call this.

        Returns when the state may change again. Arguments are those of `save_checkpoint`.

        Args:
            prune: ``folder``, ``total_limit`` and ``keep``: what may go once the checkpoint is complete.

        Raises:
            CheckpointError: on every rank, if an earlier save failed, or this one could not begin.
        """
        self.settle()
        staging = staging_of(final)
        outgoing = prepare(items, spread=spread, staging=staging, process=self.process)
        is_main = self.process.topology.is_main
        held = on_main(self.process, lambda: staging.folder(staging.location).holds(MANIFEST_NAME), "begin")
        token = on_main(self.process, lambda: staging.begin(os.getpid()), "begin")
        try:
            share = outgoing.share(self.process)
            buffer = self._reserved(share, staging, token)
            ranges = self._filled(buffer, share, staging, token)
            about = About.run(self.process, step=step, strategy=strategy)
            job = Job(
                location=staging.location,
                token=token,
                is_new=held == "False",
                rank=self.process.topology.rank,
                world_size=self.process.topology.world_size,
                sync=sync,
                items={name: asdict(record) for name, record in share.records.items()},
                files=ranges,
                about=asdict(about) if is_main else None,
                prune=dict(prune or {}) if is_main else {},
            )
            writer = _start(job, buffer, staging)
        except BaseException:
            if is_main:
                staging.abandon(token)
            raise
        self.pending = PendingSave(final, writer, self.process)
        atexit.register(self.pending.finish_alone)
        return self.pending

    def settle(self) -> None:
        """Wait for the save that is going on, if any. Every rank must call this.

        Raises:
            CheckpointError: on every rank, if it failed; once.
        """
        if self.pending is None:
            return
        try:
            self.pending.wait_unless_told()
        except CheckpointError:
            self._forget()
            raise
        self._forget()

    def _forget(self) -> None:
        if self.pending is not None:
            atexit.unregister(self.pending.finish_alone)
            self.pending = None

    @property
    def is_busy(self) -> bool:
        """Whether a save of any rank is going on. Every rank must call this."""
        pending = self.pending
        mine = (pending is not None and not pending.done, pending is not None and pending.failed)
        found = gather_object([mine], process=self.process)
        # Where a part of it has failed, the rest waits in vain; the next call says so.
        return any(busy for busy, _ in found) and not any(failed for _, failed in found)

    def close(self) -> None:
        """Give the host memory back."""
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _reserved(self, share: Share, staging: Staging, token: str) -> HostBuffer:
        """Every rank must call this. Room for this rank's files, or an error on every rank."""
        if self._buffer is None:
            self._buffer = HostBuffer(pinned=self.process.device.type == "cuda")
        problem = None
        try:
            self._buffer.begin(share.nbytes, share.num_parts)
        except FAILURES as error:
            problem = f"no {share.nbytes} bytes of host memory to copy to, {type(error).__name__}: {error}"
        raise_failures(problem, staging, token, self.process)
        return self._buffer

    def _filled(
        self, buffer: HostBuffer, share: Share, staging: Staging, token: str
    ) -> list[tuple[str, list[tuple[int, int]]]]:
        """Every rank must call this. This rank's files, copied, and where each lies, or an error on every rank."""
        # All of them whatever happens: other ranks wait in between.
        copied = [(file.name, _copied(file, buffer)) for file in share.files]
        ranges = [(name, found) for name, found in copied if isinstance(found, list)]
        problem = next((found for _, found in copied if isinstance(found, str)), None)
        if self.process.device.type != "cpu":
            torch.accelerator.synchronize(self.process.device)
        raise_failures(problem, staging, token, self.process)
        return ranges


def _copied(file: OutgoingFile, buffer: HostBuffer) -> list[tuple[int, int]] | str:
    """Where its parts lie, or what failed."""
    try:
        return [buffer.put(file.head), *(buffer.put(_plain(tensor)) for tensor in file.tensors)]
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"


def _plain(tensor: torch.Tensor | StoredTensor) -> torch.Tensor:
    return on_host(tensor) if isinstance(tensor, StoredTensor) else tensor.resolve_conj().resolve_neg()


def _start(job: Job, buffer: HostBuffer, staging: Staging) -> Writer:
    # Memory of this process, such as of `memory://`, is nothing that another could write to.
    if staging.in_process or sys.platform == "win32":
        return _WriterThread(job, buffer)
    try:
        return _WriterProcess(job, buffer)
    except OSError as error:  # such as no memory for another process: the others must hear of it
        return _NoWriter(f"rank {job.rank} could not start a process that writes `{job.location}` ({error})")


class _NoWriter:
    ended = True
    failed = True

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def give_up(self) -> None: ...

    def outcome(self, *, leave: bool = False) -> str | None:
        return self._problem


class _WriterProcess:
    def __init__(self, job: Job, buffer: HostBuffer) -> None:
        self._job = job
        self._said = b""
        path = [os.fspath(each) for each in sys.path if isinstance(each, (str, os.PathLike))]
        # Until it has said that it ignores them, signals to the whole group must not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, json.dumps(path), str(buffer.descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[buffer.descriptor],
                bufsize=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._tell(json.dumps(asdict(job)))

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def failed(self) -> bool:
        return self._process.poll() not in (None, 0)

    def give_up(self) -> None:
        self._tell("give up")

    def outcome(self, *, leave: bool = False) -> str | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if leave:
            self._process.stdin.close()
        # What was read before an interrupt is kept, so that this can be asked again.
        while not self._process.stdout.closed and (said := os.read(self._process.stdout.fileno(), 65536)):
            self._said += said
        code = self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        last = next(iter(self._said.decode().splitlines()[-1:]), "")
        if last == "done":
            return None
        if last.startswith('"'):
            return str(json.loads(last))
        if self._job.about is not None:  # it could not clear up itself
            staging_of(self._job.location).abandon(self._job.token)
        why = "Look for who killed it, such as the system out of memory" if code < 0 else "What it said is above"
        return (
            f"The checkpoint `{self._job.location}` is not complete: the process that wrote it ended with code {code}. "
            f"Earlier ones are untouched. {why}, and save again."
        )

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        data = memoryview(line.encode() + b"\n")
        try:
            while data and not self._process.stdin.closed:
                data = data[os.write(self._process.stdin.fileno(), data) :]
        except BrokenPipeError:
            pass  # it has ended; `outcome` says how


def _is_ending() -> bool:
    return not threading.main_thread().is_alive()


class _WriterThread:
    def __init__(self, job: Job, buffer: HostBuffer) -> None:
        self._given_up = threading.Event()
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._work, args=(job, buffer), name="checkpoint-writer")
        self._thread.start()

    def _work(self, job: Job, buffer: HostBuffer) -> None:
        try:
            perform(job, buffer.view(), Links(lambda _: None, self._given_up.is_set, _is_ending))
        except CheckpointError as error:
            self._problem = str(error)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self.ended and self._problem is not None

    def give_up(self) -> None:
        self._given_up.set()

    def outcome(self, *, leave: bool = False) -> str | None:
        if leave:
            self._given_up.set()
        self._thread.join()
        return self._problem
