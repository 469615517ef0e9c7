"""One started process: its group, its output and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from accel_launch.backends.streams import Stream, open_channel, write_all
from accel_launch.plan import ProcessPlan
from accel_launch.watch import StderrWatch
from accel_state.errors import ConfigError

__all__ = ["Worker"]


class Worker:
    """A process that leads a session of its own, so that it can be ended with everything it has started.

    It stays unreaped until `reap`: its number, which is also that of its group, can name nobody else meanwhile.
    """

    def __init__(self, plan: ProcessPlan, environment: Mapping[str, str], log_dir: Path | None) -> None:
        self.plan = plan
        self.exit_code: int | None = None
        """As `subprocess` has it: negative where a signal ended it. ``None`` while it runs."""
        self.exited_at = 0.0
        self.watch = StderrWatch()
        self.muted = False
        """Whether its stderr is no longer shown."""
        self.streams: list[Stream] = []
        stdout, stderr = None, self._open(2, log_dir)
        if log_dir is not None:  # else it is inherited
            stdout = self._open(1, log_dir)
        try:
            self._process = subprocess.Popen(
                plan.argv,
                env=environment,
                # One terminal cannot answer several processes: `input()` and the debugger are rank 0's.
                stdin=None if plan.local_rank == 0 else subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            for stream in self.streams:
                stream.close()
            raise ConfigError(
                f"Rank {plan.rank} could not be started as `{' '.join(plan.argv)}`: {error}. "
                f"Check that the program exists and may be executed."
            ) from error
        finally:
            os.close(stderr)
            if stdout is not None:
                os.close(stdout)

    def _open(self, fd: int, log_dir: Path | None) -> int:
        """Make the stream for a standard descriptor; the end that the worker writes to."""
        # stdout is written in blocks where it is no terminal; stderr in lines anyway, but bars need to know.
        terminal = os.isatty(fd) and (fd == 1 or self.plan.local_rank == 0)
        reader, writer = open_channel(terminal=terminal)
        log: BinaryIO | None = None
        if log_dir is not None:
            name = f"rank{self.plan.rank}.{'stdout' if fd == 1 else 'stderr'}.log"
            log = open(log_dir / name, "wb", buffering=0)  # noqa: SIM115 - the stream closes it
        take = self._take_stdout if fd == 1 else self._take_stderr
        self.streams.append(Stream(reader, terminal=terminal, log=log, take=take))
        return writer

    @property
    def pid(self) -> int:
        """Number of the process and of its group."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether its end was not yet seen."""
        return self.exit_code is None

    def look(self) -> bool:
        """Whether it has ended since the last look. Its remaining output is then taken."""
        if not self.is_alive:
            return False
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return False
        status = ended.si_status
        self.exit_code = status if ended.si_code == os.CLD_EXITED else -status
        self.exited_at = time.monotonic()
        for stream in self.streams:
            stream.drain()
        self.show(self.watch.flush())
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it has started and that stayed in its group."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # all gone; macOS says so of zombies by the second
            return

    def show(self, data: bytes) -> None:
        """Write to the launcher's stderr, unless this worker is muted."""
        if data and not self.muted:
            write_all(2, data)

    def reap(self) -> None:
        """Let go of the ended process and of its streams."""
        self._process.wait()
        for stream in self.streams:
            stream.close()

    def _take_stdout(self, data: bytes) -> None:
        write_all(1, data)

    def _take_stderr(self, data: bytes) -> None:
        self.show(self.watch.feed(data, time.monotonic()))
