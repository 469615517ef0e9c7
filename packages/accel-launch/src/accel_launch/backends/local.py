"""Starts the processes of a plan on this machine, watches them, and ends them all with the first that fails."""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from accel_launch.backends.guard import Guard
from accel_launch.backends.report import describe_failure, describe_interruption
from accel_launch.backends.signals import PASSED_ON, SignalPipe
from accel_launch.backends.streams import Stream, write_all
from accel_launch.backends.worker import Worker
from accel_launch.plan import LaunchPlan
from accel_state.errors import ConfigError

__all__ = ["run_local"]

_TERMINATE_AFTER_S = 0.7
"""Until a worker that was asked by Ctrl-C, as Python scripts expect it, is asked by SIGTERM."""
_KILL_AFTER_S = 1.4
"""Until a worker that was asked to end is killed. With it everything is gone within 2 s."""
_EARLIER_WITHIN_S = 1.0
"""How long a failure waits for a rank that failed before it and is still on its way out."""


def run_local(plan: LaunchPlan, inherited: Mapping[str, str]) -> int:
    """Run the processes of this machine to their end.

    Args:
        plan: complete, its port included.
        inherited: the environment that they get beside what is planned.

    Returns:
        0, or the exit code of the process that failed first (128 + n if signal n ended it), or 128 + n
        if this process got signal n. No worker is alive any more then.
    """
    with SignalPipe() as signals, Guard() as guard, selectors.DefaultSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        run = _Run(plan, selector)
        try:
            run.start(inherited, guard)
            while run.is_running:
                ready = [key.fileobj for key, _ in selector.select(run.timeout())]
                # Signals are read before workers are looked at: a SIGCHLD that comes in between stays to wake the
                # next `select`. The other way round, a worker's end could be read away unseen, and nothing wake it.
                numbers = signals.read()
                run.look()
                run.take(each for each in ready if isinstance(each, Stream))
                for number in numbers:
                    run.on_signal(number)
                run.advance()
        finally:
            run.finish()
        return run.conclude()


class _Run:
    """The workers of one launch, and how far their end has come."""

    def __init__(self, plan: LaunchPlan, selector: selectors.BaseSelector) -> None:
        self._plan = plan
        self._selector = selector
        self._workers: list[Worker] = []
        self._failed_at: float | None = None
        """When the first exit code other than 0 was seen."""
        self._root: Worker | None = None
        """The worker whose failure ended the launch."""
        self._root_was_ending = False
        """Whether it was ended before it had ended by itself, so that its exit code is not its own."""
        self._signal: signal.Signals | None = None
        """The signal that ended the launch."""
        self._steps: list[tuple[float, signal.Signals]] = []
        """What is still to be sent to the workers, and when."""
        self._num_stopped = 0

    def start(self, inherited: Mapping[str, str], guard: Guard) -> None:
        log_dir = Path(self._plan.log_dir) if self._plan.log_dir is not None else None
        if log_dir is not None:
            try:
                log_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"`--log-dir {log_dir}` was given, but that folder cannot be made ({error.strerror}). "
                    f"Name a folder that can be written, or leave the flag out."
                ) from error
        for process in self._plan.processes:
            worker = Worker(process, self._plan.environment(process, inherited), log_dir)
            self._workers.append(worker)
            guard.protect(worker.pid)
            for stream in worker.streams:
                self._selector.register(stream, selectors.EVENT_READ)

    @property
    def is_running(self) -> bool:
        return any(worker.is_alive for worker in self._workers)

    @property
    def _is_stopping(self) -> bool:
        return self._root is not None or self._signal is not None

    def timeout(self) -> float | None:
        """Seconds until `advance` has something to do, ``None`` for as long as nothing happens."""
        times = [at for at, _ in self._steps]
        if self._failed_at is not None and not self._is_stopping:
            times.append(self._failed_at + _EARLIER_WITHIN_S)
        for worker in self._workers:
            at = worker.watch.next_poll
            waits = self._failed_at is not None or self._is_stopping
            if at is not None and worker.is_alive and not (waits and worker.watch.held_since is not None):
                times.append(at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def look(self) -> None:
        """See who has ended, before reading what others wrote because of it."""
        for worker in self._workers:
            if worker.look() and worker.exit_code == 0:
                worker.show(worker.watch.release())
            elif worker.exit_code and self._failed_at is None:
                self._failed_at = worker.exited_at

    def take(self, ready: Iterable[Stream]) -> None:
        """Read the streams that have something."""
        for stream in ready:
            stream.read()
            if not stream.is_open:
                self._selector.unregister(stream)

    def on_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGWINCH:
            for worker in self._workers:
                for stream in worker.streams:
                    stream.resize()
        elif number in PASSED_ON:
            self._send(number)
        elif self._signal is not None:
            self._send(signal.SIGKILL)  # asked a second time
        else:
            self._signal = number
            self._stop(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def advance(self) -> None:
        """Do what is due now."""
        now = time.monotonic()
        if self._failed_at is not None and not self._is_stopping:
            waited = now >= self._failed_at + _EARLIER_WITHIN_S
            if waited or not self._earlier():
                self._stop_others()
        for worker in self._workers:
            if worker.watch.held_since is None or not (self._is_stopping or self._failed_at is not None):
                worker.show(worker.watch.poll(now) if worker.is_alive else b"")
        while self._steps and self._steps[0][0] <= now:
            self._send(self._steps.pop(0)[1])

    def _earlier(self) -> list[Worker]:
        """Ranks whose last words began before the first exit, and that are still on their way out."""
        return [
            worker
            for worker in self._workers
            if worker.is_alive and worker.watch.looks_final and _failed_since(worker) < (self._failed_at or 0.0)
        ]

    def _stop_others(self) -> None:
        """The first failure is known: show its last words, silence the others and end them."""
        failed = [worker for worker in self._workers if worker.exit_code]
        if all(worker.watch.looks_cascaded for worker in failed):
            failed += self._earlier()  # slow to end, but the cause
        self._root = min(failed, key=_blame)
        self._root_was_ending = self._root.is_alive
        self._root.show(self._root.watch.release())
        for worker in self._workers:
            worker.muted = worker is not self._root
        self._stop(signal.SIGTERM)

    def _stop(self, first: signal.Signals) -> None:
        now = time.monotonic()
        self._num_stopped = sum(worker.is_alive and worker is not self._root for worker in self._workers)
        # Who ends since another failed has nothing to save: it could not agree with that one.
        grace = self._plan.grace_period if self._signal is not None else None
        kill_after = _KILL_AFTER_S if grace is None else grace
        self._steps = [(now, first), (now + kill_after, signal.SIGKILL)]
        if first == signal.SIGINT:
            terminate_after = _TERMINATE_AFTER_S if grace is None else grace / 2
            self._steps.insert(1, (now + terminate_after, signal.SIGTERM))

    def _send(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.is_alive or number == signal.SIGKILL:
                worker.signal(number)

    def finish(self) -> None:
        """Leave nothing behind: what the workers of a stopped launch have started ends with them."""
        if self.is_running or self._is_stopping:
            self._send(signal.SIGKILL)
        for worker in self._workers:
            worker.reap()

    def conclude(self) -> int:
        """Say what happened, unless all is well or the launcher was told to be quiet; the exit code."""
        if self._signal is not None:
            text, code = describe_interruption(self._plan, self._signal, self._num_stopped), 128 + self._signal
        elif self._root is not None:
            exit_code = self._root.exit_code or 1
            if self._root_was_ending and exit_code < 0:
                exit_code = 1  # python's own after a traceback
            text = describe_failure(self._plan, self._root.plan, exit_code, self._num_stopped)
            code = exit_code if exit_code > 0 else 128 - exit_code
        else:
            return 0
        if not self._plan.quiet:
            write_all(2, text.encode())
        return code


def _failed_since(worker: Worker) -> float:
    """When a rank's failure began."""
    since = worker.watch.held_since
    return worker.exited_at if since is None else since


def _blame(worker: Worker) -> tuple[bool, float]:
    """Least for the rank that failed first. Who speaks of a lost peer comes last: that one's end may be seen later."""
    return worker.watch.looks_cascaded, _failed_since(worker)
