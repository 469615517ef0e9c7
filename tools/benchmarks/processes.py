"""Where samples come from: processes that stay and measure a block on demand, and commands that are timed."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import IO

from benchmarks.compare import Sampler
from benchmarks.sides import Side

__all__ = ["Opener", "command", "printed", "workers"]

Opener = Callable[[], AbstractContextManager[Sampler]]
"""Starts what takes samples."""

LIMIT_S = 120
"""Longest that a command may take."""


def workers(side: Side, module: str, variant: str, *, world_size: int = 1) -> Opener:
    """Processes of `side` that run ``benchmarks.<module>.block(side, variant)`` whenever a sample is asked for.

    They are the ranks of one world. Rank 0's measure is the sample. Between samples they wait and use no time.
    """
    return partial(_workers, side, module, variant, world_size)


@contextmanager
def _workers(side: Side, module: str, variant: str, world_size: int) -> Iterator[Sampler]:
    port = str(_free_port())
    with ExitStack() as stack:
        crew = []
        for rank in range(world_size):
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": "benchmark",  # Fabric takes a launcher's world only if it sees this
            }
            process = subprocess.Popen(
                [side.python, "-m", "benchmarks.worker", module, side.name, variant],
                env=side.environment(**(place if world_size > 1 else {})),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )
            stack.callback(_end, process)
            crew.append((process, errors))

        def sample() -> float:
            for process, errors in crew:
                _say(process, errors)
            answers = [_hear(process, errors) for process, errors in crew]
            return answers[0]

        yield sample


def command(side: Side, words: Sequence[str]) -> Opener:
    """The time that ``python <words>`` takes from start to end."""
    return partial(_command, side, words)


@contextmanager
def _command(side: Side, words: Sequence[str]) -> Iterator[Sampler]:
    def sample() -> float:
        start = time.perf_counter()
        _run(side, words)
        return time.perf_counter() - start

    yield sample


def printed(side: Side, code: str) -> Opener:
    """The number of seconds that a fresh interpreter prints at the end of `code`."""
    return partial(_printed, side, code)


@contextmanager
def _printed(side: Side, code: str) -> Iterator[Sampler]:
    def sample() -> float:
        return float(_run(side, ["-c", code]).split()[-1])

    yield sample


def _run(side: Side, words: Sequence[str]) -> str:
    done = subprocess.run(
        [side.python, *words],
        env=side.environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def _say(process: subprocess.Popen[str], errors: IO[str]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write("go\n")
    except BrokenPipeError:
        raise _ended(process, errors) from None


def _hear(process: subprocess.Popen[str], errors: IO[str]) -> float:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise _ended(process, errors)
    return float(line)


def _ended(process: subprocess.Popen[str], errors: IO[str]) -> RuntimeError:
    code = process.wait(LIMIT_S)
    errors.seek(0)
    return RuntimeError(f"A worker ended with {code}: {errors.read()[-500:]}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
