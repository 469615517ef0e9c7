"""Launches from a notebook or a Python prompt: the function is there already, and cannot be imported elsewhere.

What is defined in a cell lives in this process only, so several processes are made by forking it. A fork copies
memory but neither threads nor what a device driver knows: what cannot work after one is refused before it.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

from accel_launch.host import inspect_host
from accel_launch.port import hold_free_port
from accel_launch.watch import speaks_of_lost_peer
from accel_state.config import LaunchSettings, MixedPrecision, RunConfig
from accel_state.env import Launcher, ProcessEnvironment, snapshot
from accel_state.errors import AccelError, ConfigError

__all__ = ["WorkerError", "debug_launcher", "notebook_launcher"]

_TERMINATED_WITHIN_S = 1.5
_BLAME_WITHIN_S = 2.0
"""How long a rank that lost its peer may be ahead of the report of that peer."""


class WorkerError(AccelError, RuntimeError):
    """A launched process failed. The message holds its traceback.

    Args:
        rank: the process that failed first.
        reason: its traceback, or how it ended.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"Rank {rank} failed, and the others were stopped:\n{reason}")
        self.rank = rank
        self.reason = reason


def notebook_launcher(
    function: Callable[..., object],
    args: Sequence[Any] = (),
    *,
    num_processes: int | None = None,
    mixed_precision: MixedPrecision | None = None,
) -> None:
    """Call ``function(*args)`` on one or several processes of this machine.

    One process is this one: variables, models and devices stay afterwards. Several are forked from it, each with
    its `Process` open when `function` starts, and with one CPU thread (a forked OpenMP pool does not work again);
    what they compute ends with them, so have rank 0 save it. It returns when all have ended.

    Args:
        function: may be defined in a cell.
        args: its arguments.
        num_processes: how many; by default one a CUDA device, else one.
        mixed_precision: what an `Accelerator` that is told nothing else computes in.

    Raises:
        ConfigError: if this process is in a state that a fork does not survive: a device or a `Process` is in use,
            or autograd has run. The message names it and the remedy.
        WorkerError: if a process fails, with its traceback. The others have been ended.
    """
    settings = _settings(mixed_precision, "notebook_launcher", device=None)
    host = inspect_host(snapshot())
    count = _count(num_processes, max(1, host.num_gpus))
    if count > 1:
        _fork_all(function, args, count, settings)
    elif not settings.values:
        function(*args)
    else:
        _call_here(function, args, settings)


def debug_launcher(function: Callable[..., object], args: Sequence[Any] = (), *, num_processes: int = 2) -> None:
    """Call ``function(*args)`` on several processes of this machine's CPU, whatever devices it has.

    To find out, in a notebook or a test, whether a function is right in a world of several. Everything
    else is as with `notebook_launcher`.

    Raises:
        ConfigError: as with `notebook_launcher`.
        WorkerError: if a process fails, with its traceback.
    """
    settings = _settings(None, "debug_launcher", device="cpu")
    if _count(num_processes, 1) > 1:
        _fork_all(function, args, num_processes, settings)
    else:
        _call_here(function, args, settings)


def _settings(mixed_precision: MixedPrecision | None, source: str, *, device: str | None) -> LaunchSettings:
    given = {"mixed_precision": mixed_precision, "device": device}
    values = {name: value for name, value in given.items() if value is not None}
    settings = LaunchSettings(values=values, sources=dict.fromkeys(values, source))
    RunConfig(**settings.values, sources=settings.sources)  # refuses a value that is none
    return settings


def _count(given: int | None, default: int) -> int:
    if given is None:
        return default
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(f"`num_processes={given!r}` is not a count of at least one. Give a positive integer.")
    return given


def _call_here(function: Callable[..., object], args: Sequence[Any], settings: LaunchSettings) -> None:
    """Call it in this process, which is told the settings."""
    from accel_state.process import Process, ProcessSettings

    _refuse_open_process()
    environment = ProcessEnvironment(run_config=settings.to_json())
    with Process.open(ProcessSettings(device=settings.values.get("device")), environment=environment):
        function(*args)


def _refuse_open_process() -> None:
    from accel_state.process import Process

    if Process.is_open():
        raise ConfigError(
            f"A process is open here already ({Process.current()}), by an `Accelerator()` or `Process.open()` of an "
            f"earlier cell, and it would be taken for one of the launched ones. "
            f"Create the `Accelerator` inside the launched function only, and restart the kernel."
        )


def _refuse_devices_in_use() -> None:
    """A forked process can use no device that its parent has used."""
    from accel_state.device import DEVICES

    for kind in DEVICES.values():
        # Asking a type that lives in a plugin would import the plugin, which nobody uses who did not import it.
        if kind.plugin is not None and kind.plugin not in sys.modules:
            continue
        if kind.call("is_initialized", default=False) is True:
            raise ConfigError(
                f"This process uses `{kind.type}` already: a cell has put a tensor or a model there, or asked for its "
                f"memory or properties. A process forked from it could not use the device. "
                f"Restart the kernel, and touch devices only inside the launched function."
            )


def _fork_all(function: Callable[..., object], args: Sequence[Any], count: int, settings: LaunchSettings) -> None:
    _refuse_open_process()
    _refuse_devices_in_use()
    if sys.platform == "win32" or "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            f"`num_processes={count}` in a notebook needs processes that are forked, and this system has none. "
            f"Write the function to a file and use `accel launch`."
        )
    sys.stdout.flush()
    sys.stderr.flush()
    with hold_free_port() as port:
        workers: list[_Worker] = []
        try:
            for rank in range(count):
                worker = _Worker(rank, count, port, settings, function, args)
                worker.start()
                workers.append(worker)
            _wait(workers)
        finally:
            _end(workers)


class _Worker:
    """A forked rank, seen from its parent."""

    def __init__(
        self,
        rank: int,
        count: int,
        port: int,
        settings: LaunchSettings,
        function: Callable[..., object],
        args: Sequence[Any],
    ) -> None:
        self.rank = rank
        self.receiver: Connection
        self.process: ForkProcess
        self._call = (settings.values.get("device"), function, args)
        self._environment = ProcessEnvironment(
            launcher=Launcher.TORCHRUN,
            rank=rank,
            world_size=count,
            local_rank=rank,
            local_world_size=count,
            master_addr="127.0.0.1",
            master_port=port,
            run_config=settings.to_json() if settings.values else None,
        )

    def start(self) -> None:
        """Fork it. The pipe is made now: a rank forked before holds no end of it, so that its end is seen."""
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(sender, self._environment, *self._call))
        self.process.start()
        sender.close()

    def result(self) -> tuple[str, str]:
        """What it reported: ("ok" or "failed" or "autograd", text)."""
        try:
            kind, text = self.receiver.recv()
        except EOFError:
            self.process.join(_TERMINATED_WITHIN_S)
            return "failed", _unreported(self.process.exitcode)
        return kind, text


def _unreported(code: int | None) -> str:
    if code is not None and code < 0:
        return f"It was killed by {signal.Signals(-code).name}, without a word of its own."
    return f"It ended with exit code {code}, without a word of its own."


def _wait(workers: list[_Worker]) -> None:
    waiting = {worker.receiver: worker for worker in workers}
    failures: list[tuple[int, str]] = []
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=_BLAME_WITHIN_S if failures else None)
        for receiver in ready:
            worker = waiting.pop(receiver)  # type: ignore[call-overload]
            kind, text = worker.result()
            if kind == "autograd":
                raise ConfigError(
                    "Autograd has run in this process: a cell has called `backward()`. A process forked from it "
                    "cannot compute gradients. Restart the kernel, and train only inside the launched function."
                )
            if kind == "failed":
                failures.append((worker.rank, text))
        if failures and not (ready and all(speaks_of_lost_peer(text.encode()) for _, text in failures)):
            break  # the cause is among them, or nobody else has anything to say
    if failures:
        raise WorkerError(*min(failures, key=lambda failure: speaks_of_lost_peer(failure[1].encode())))
    for worker in workers:
        worker.process.join()


def _end(workers: list[_Worker]) -> None:
    """End what still runs, and let go of all."""
    alive = [worker.process for worker in workers if worker.process.is_alive()]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + _TERMINATED_WITHIN_S
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    for worker in workers:
        worker.receiver.close()


def _run(
    sender: Connection,
    environment: ProcessEnvironment,
    device: str | None,
    function: Callable[..., object],
    args: Sequence[Any],
) -> None:
    """Body of a forked rank. What happens is reported before anything is closed, so before a peer can notice."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from accel_state.process import Process, ProcessSettings

    torch.set_num_threads(1)
    if not _autograd_works():
        sender.send(("autograd", ""))
        return
    try:
        with Process.open(ProcessSettings(device=device), environment=environment):
            function(*args)
            sender.send(("ok", ""))
    except BaseException:  # whatever ends it, a SystemExit too, is told to the parent; nothing is swallowed
        sender.send(("failed", traceback.format_exc()))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _autograd_works() -> bool:
    """Whether gradients can be computed in this forked process: not if its parent has computed any."""
    import torch

    try:
        torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "fork" not in str(error):
            raise
        return False
    return True
