"""Runs a function on several real processes, for tests: free ports, hard timeouts, every rank's stack.

`run_ranks` starts one process a rank from a server that has torch loaded already, so a world of two takes
tens of milliseconds, not seconds. A rank that hangs is shown with its stack and killed; nothing is left behind.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from accel_state.env import Launcher, ProcessEnvironment
from accel_state.process import Process, ProcessSettings

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["RankError", "run_ranks"]


class RankError(AssertionError):
    """A rank failed or did not end in time; the message holds its traceback or every rank's stack."""


@dataclass(frozen=True)
class _Task:
    path: str
    name: str
    args: tuple[Any, ...]
    environment: ProcessEnvironment
    settings: ProcessSettings | None
    stacks: str
    num_threads: int


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    settings: ProcessSettings | None = None,
    open_process: bool = True,
    nodes: int = 1,
) -> list[Any]:
    """Call ``function(*args)`` on `world_size` processes and return what each gave, in order of rank.

    Each rank opens its `Process` on the CPU first (and closes it afterwards), and computes with one thread.

    Args:
        function: defined at the top level of a file. The file is run anew in each rank.
        world_size: number of ranks; 1 works too, without a process group.
        args: anything that pickles.
        timeout_s: seconds after which every rank's stack is printed and all are killed.
        settings: what to open the `Process` with; by default a CPU with a collective timeout of `timeout_s`.
        open_process: ``False`` leaves opening to `function`, which finds the rendezvous by `rank_environment`.
        nodes: into how many nodes the ranks are told to be divided.

    Raises:
        RankError: if a rank raised, died or hung.
    """
    if "<locals>" in function.__qualname__:
        raise ValueError(f"`{function.__qualname__}` is defined inside a function: each rank loads it from its file.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.nn.parallel", "accel_state.testing"])
    store = (
        dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        if world_size > 1
        else None
    )
    per_node = world_size // nodes
    if settings is None and open_process:
        settings = ProcessSettings(device="cpu", timeout_s=timeout_s)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = []
        for rank in range(world_size):
            environment = ProcessEnvironment(
                launcher=Launcher.TORCHRUN if world_size > 1 else Launcher.NONE,
                rank=rank,
                world_size=world_size,
                local_rank=rank % per_node,
                local_world_size=per_node,
                node_rank=rank // per_node,
                master_addr="127.0.0.1" if store else None,
                master_port=store.port if store else None,
                agent_store=True,
            )
            path = str(Path(function.__code__.co_filename).resolve())
            stacks = str(Path(folder) / f"rank{rank}.stack")
            task = _Task(path, function.__qualname__, args, environment, settings, stacks, 1)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(task, sender), name=f"rank{rank}", daemon=False)
            process.start()
            sender.close()
            ranks.append(_Rank(rank, process, receiver, stacks))
        try:
            return _collect(ranks, timeout_s)
        finally:
            for each in ranks:
                each.end()


def rank_environment() -> ProcessEnvironment:
    """The place of the rank that calls it, for functions started with ``open_process=False``."""
    if _Here.environment is None:
        raise RuntimeError("rank_environment() is only known inside a function that run_ranks started.")
    return _Here.environment


class _Here:
    environment: ProcessEnvironment | None = None


@dataclass
class _Rank:
    rank: int
    process: Any
    receiver: multiprocessing.connection.Connection
    stacks: str
    answer: tuple[bool, Any] | None = None

    def read(self) -> bool:
        """Take the answer if there is one. False once the rank is gone without giving any."""
        try:
            data = self.receiver.recv_bytes()
        except (EOFError, OSError):
            return False
        self.answer = pickle.loads(data)
        return True

    def stack(self) -> str:
        text = Path(self.stacks).read_text() if Path(self.stacks).exists() else ""
        return text.strip() or "(no stack: it had ended, or was not started yet)"

    def end(self) -> None:
        if self.process.is_alive():
            self.process.join(0.0 if self.answer is None or not self.answer[0] else 5.0)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5.0)
        self.receiver.close()
        self.process.close()


def _collect(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    waiting = {each.receiver: each for each in ranks}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(_hung(list(waiting.values()), timeout_s))
        for receiver in ready:
            each = waiting.pop(receiver)  # type: ignore[call-overload]
            if not each.read():
                each.process.join(5.0)
                raise RankError(f"Rank {each.rank} died without a word, exit code {each.process.exitcode}.")
            assert each.answer is not None
            if not each.answer[0]:
                raise RankError(f"Rank {each.rank} raised:\n{each.answer[1]}")
    return [each.answer[1] for each in ranks if each.answer is not None]


def _hung(waiting: list[_Rank], timeout_s: float) -> str:
    for each in waiting:
        if each.process.is_alive():
            os.kill(each.process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    stacks = "\n".join(f"--- rank {each.rank}, process {each.process.pid}\n{each.stack()}" for each in waiting)
    return f"After {timeout_s:g} s these ranks had not ended: {[each.rank for each in waiting]}\n{stacks}"


def _run(task: _Task, sender: multiprocessing.connection.Connection) -> None:
    stacks = open(task.stacks, "w")  # noqa: SIM115 - faulthandler writes to it until the process ends
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(task.num_threads)
    try:
        answer = (True, _call(task))
        data = _dump(answer)
    except BaseException:
        data = _dump((False, traceback.format_exc()))
    sender.send_bytes(data)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()


def _call(task: _Task) -> Any:
    environment = task.environment
    _Here.environment = environment
    store: Store | None = None
    if environment.world_size > 1 and environment.master_port is not None and task.settings is not None:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1",
            environment.master_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=task.settings.timeout_s),
        )
    function = _load(task.path, task.name)
    if task.settings is None:
        return function(*task.args)
    with Process.open(task.settings, environment=environment, store=store):
        return function(*task.args)


def _load(path: str, name: str) -> Callable[..., Any]:
    module_name = f"_ranks_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(Path(path).parent))
    spec.loader.exec_module(module)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _dump(answer: Any) -> bytes:
    """Plain pickle: tensors by value, since the rank that owns shared memory is about to end."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer).dump(answer)
    return buffer.getvalue()
