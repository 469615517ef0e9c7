"""Runs a function on several real processes, for tests: free ports, hard timeouts, every rank's stack.

`run_ranks` starts one process a rank from a server that has torch loaded already, so a world of two takes
tens of milliseconds, not seconds. A rank that hangs is shown with its stack and killed; nothing is left behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
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
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from accel_state.env import Launcher, ProcessEnvironment
from accel_state.process import Process, ProcessSettings

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["RankError", "rank_environment", "run_ranks"]

_PRELOADED = ["torch", "torch._dynamo", "torch.nn.parallel", "numpy", "pytest", "accel_state.testing"]
_GRACE_S = 10.0
"""How long a rank that has answered may take to end."""

_environment: ContextVar[ProcessEnvironment] = ContextVar("rank_environment")


class RankError(AssertionError):
    """A rank failed or did not end in time; the message holds its traceback or every rank's stack."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    path: str
    module: str
    name: str
    args: bytes
    """Pickled apart, since their classes may be found in the function's file only."""
    environment: ProcessEnvironment
    settings: ProcessSettings | None
    stacks: str


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

    Each rank opens its `Process` on the CPU first (and closes it afterwards), and computes with one thread. The ranks
    see the environment variables of the time of the first call, when the server started: pass values as `args`.

    Args:
        function: defined at the top level of a file. The file is run anew in each rank.
        world_size: number of ranks; 1 works too, without a process group.
        args: anything that pickles.
        timeout_s: seconds after which every rank's stack is printed and all are killed.
        settings: what to open the `Process` with; by default a CPU with a collective timeout of `timeout_s`.
        open_process: ``False`` leaves opening to `function`, which finds the rendezvous by `rank_environment`.
        nodes: into how many nodes of equal size the ranks are told to be divided.

    Raises:
        ValueError: if `function` is not at the top level, or the numbers make no world.
        RuntimeError: if a rank calls it.
        RankError: if a rank raised, died or hung, or did not end after its answer.
    """
    if _environment.get(None) is not None:
        raise RuntimeError("run_ranks was called by a rank that it has started, and worlds do not nest.")
    if "<locals>" in function.__qualname__:
        raise ValueError(f"`{function.__qualname__}` is defined inside a function: each rank loads it from its file.")
    if world_size < 1 or nodes < 1 or world_size % nodes:
        raise ValueError(f"{world_size} rank(s) cannot be divided evenly into {nodes} node(s).")
    if settings is None and open_process:
        settings = ProcessSettings(device="cpu", timeout_s=timeout_s)
    store = _serve_store() if world_size > 1 else None
    port = None if store is None else store.port
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                task = _Task(
                    path=str(Path(function.__code__.co_filename).resolve()),
                    module=function.__module__,
                    name=function.__qualname__,
                    args=pickle.dumps(args),
                    environment=_place(rank, world_size, world_size // nodes, port),
                    settings=settings if open_process else None,
                    stacks=str(Path(folder) / f"rank{rank}.stack"),
                )
                ranks.append(_start(task))
            return _collect(ranks, timeout_s)
        finally:
            for each in ranks:
                each.end()


def rank_environment() -> ProcessEnvironment:
    """The place of the rank that calls it, for functions started with ``open_process=False``."""
    found = _environment.get(None)
    if found is None:
        raise RuntimeError("rank_environment() is only known inside a function that run_ranks started.")
    return found


@dataclass
class _Rank:
    """A started rank, as its parent sees it."""

    rank: int
    process: Any
    receiver: multiprocessing.connection.Connection
    stacks: Path
    answer: tuple[bool, Any] | None = None

    def read(self) -> str | None:
        """Take the answer. Returns what went wrong, if anything did."""
        try:
            self.answer = pickle.loads(self.receiver.recv_bytes())
        except (EOFError, OSError):
            self.process.join(5.0)
            return f"Rank {self.rank} died without a word, {self._ending()}."
        except (ImportError, AttributeError) as error:
            return f"Rank {self.rank} gave an answer that cannot be read here: {error}"
        assert self.answer is not None
        return None if self.answer[0] else f"Rank {self.rank} raised:\n{self.answer[1]}"

    def _ending(self) -> str:
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def wait(self) -> str | None:
        """After the answer: wait for the end. Returns what went wrong, if anything did."""
        self.process.join(_GRACE_S)
        if self.process.is_alive():
            return _stacks_of([self], f"Rank {self.rank} gave its answer, but did not end within {_GRACE_S:g} s.")
        if self.process.exitcode != 0:
            return f"Rank {self.rank} gave its answer, but then failed to end, {self._ending()}."
        return None

    def end(self) -> None:
        """Kill what is left of the rank, its own children too, and let go of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():  # too young to lead a group
            self.process.kill()
        self.process.join(5.0)
        self.receiver.close()
        self.process.close()


def _serve_store() -> Any:
    """A rendezvous store at a port that the kernel chose, so that two runs at once never meet."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def _place(rank: int, world_size: int, per_node: int, port: int | None) -> ProcessEnvironment:
    return ProcessEnvironment(
        launcher=Launcher.NONE if port is None else Launcher.TORCHRUN,
        rank=rank,
        world_size=world_size,
        local_rank=rank % per_node,
        local_world_size=per_node,
        node_rank=rank // per_node,
        master_addr=None if port is None else "127.0.0.1",
        master_port=port,
        agent_store=True,
    )


def _start(task: _Task) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    rank = task.environment.rank
    process = context.Process(target=_run, args=(task, sender), name=f"rank{rank}", daemon=False)
    process.start()
    sender.close()
    return _Rank(rank, process, receiver, Path(task.stacks))


def _collect(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    waiting: dict[Any, _Rank] = {each.receiver: each for each in ranks}
    problems: list[str] = []
    while waiting:
        left_s = deadline - time.monotonic()
        # After a failure, a moment more: it may be the consequence of another rank's.
        ready = multiprocessing.connection.wait(list(waiting), timeout=0.2 if problems else max(0.0, left_s))
        if not ready:
            break
        problems += [text for receiver in ready if (text := waiting.pop(receiver).read()) is not None]
    if problems:
        raise RankError("\n".join(problems))
    if waiting:
        numbers = [each.rank for each in waiting.values()]
        raise RankError(_stacks_of(list(waiting.values()), f"After {timeout_s:g} s, ranks {numbers} had not ended."))
    for each in ranks:
        problem = each.wait()
        if problem is not None:
            raise RankError(problem)
    return [each.answer[1] for each in ranks if each.answer is not None]


def _stacks_of(ranks: list[_Rank], headline: str) -> str:
    for each in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each.process.pid, signal.SIGUSR1)
    stacks = [f"--- rank {each.rank}, process {each.process.pid}\n{_stack(each.stacks)}" for each in ranks]
    return "\n".join([headline, *stacks])


def _stack(path: Path) -> str:
    """What the rank wrote on the signal: every thread's stack, Python frames only."""
    deadline = time.monotonic() + 1.0
    written = ""
    while time.monotonic() < deadline:
        text = path.read_text() if path.exists() else ""
        if text and text == written:
            break
        written = text
        time.sleep(0.02)
    return written.strip() or "(no stack: it had ended, or was not started yet)"


def _run(task: _Task, sender: multiprocessing.connection.Connection) -> None:
    """In the rank."""
    os.setsid()  # a group of its own, so that its children can be killed with it
    stacks = open(task.stacks, "w")  # noqa: SIM115 - faulthandler writes to it until the process ends
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    _environment.set(task.environment)
    try:
        # Plain pickle copies tensors: the shared memory of a rank goes with it.
        data = pickle.dumps((True, _call(task)))
    except BaseException:  # whatever it is, the parent shows it
        data = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(data)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()


def _call(task: _Task) -> Any:
    function = _load(task)
    args = pickle.loads(task.args)
    if task.settings is None:
        return function(*args)
    with Process.open(task.settings, environment=task.environment, store=_join_store(task)):
        return function(*args)


def _join_store(task: _Task) -> Store | None:
    if task.environment.master_port is None or task.settings is None:
        return None
    return dist.TCPStore(  # type: ignore[attr-defined, no-any-return, unused-ignore]
        "127.0.0.1",
        task.environment.master_port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=task.settings.timeout_s),
    )


def _load(task: _Task) -> Callable[..., Any]:
    """The function, from a module of the name that it has in the parent, so that its classes pickle both ways."""
    found: Any = _import(task.module, Path(task.path))
    for part in task.name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _import(name: str, path: Path) -> Any:
    if name == "__main__":
        # multiprocessing has run the parent's script already, under a name that does not start it again.
        return sys.modules["__main__"]
    try:
        known = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        known = None
    if known is not None and known.origin is not None and Path(known.origin).resolve() == path:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    for end, char in enumerate(name):
        if char == ".":  # pickle imports what stands above a class's module, which may be a folder's name only
            sys.modules.setdefault(name[:end], ModuleType(name[:end]))
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module
