"""The tools of the tests themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accel_state import Process, ProcessSettings
from accel_state.testing import RankError, leak_guard, rank_environment, run_ranks


@dataclass
class Answer:
    """A class of this file, known in ranks and in their parent."""

    value: Any


def rank() -> int:
    return Process.current().topology.rank


def echo(answer: Answer) -> Answer:
    return Answer([answer.value, rank(), torch.ones(2), torch.get_num_threads()])


def test_arguments_and_answers_travel_classes_of_the_file_too() -> None:
    first, second = run_ranks(echo, 2, Answer("x"))
    assert isinstance(second, Answer)
    assert (first.value[:2], second.value[:2], second.value[3]) == (["x", 0], ["x", 1], 1)
    assert second.value[2].tolist() == [1, 1]
    assert run_ranks(echo, 1, Answer("y"))[0].value[1] == 0


def hang_in_the_middle() -> None:
    if rank() == 1:
        time.sleep(1000)
    dist.barrier()


def test_a_hang_shows_all_stacks_and_kills() -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"After 1 s, ranks \[0, 1\] had not ended") as caught:
        run_ranks(hang_in_the_middle, 2, timeout_s=1.0, settings=ProcessSettings(device="cpu", timeout_s=60))
    text = str(caught.value)
    assert text.count("in hang_in_the_middle") == 2
    assert "barrier" in text
    assert time.monotonic() - begin < 10
    for pid in re.findall(r"process (\d+)", text):
        assert not Path(f"/proc/{pid}").exists()


def fail_on(which: list[int]) -> int:
    if rank() in which:
        raise ValueError(f"broken {rank()}")
    return rank()


def test_a_rank_that_raises_shows_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)Rank 1 raised:.*in fail_on.*ValueError: broken 1"):
        run_ranks(fail_on, 2, [1])


def test_every_failure_is_shown() -> None:
    with pytest.raises(RankError, match=r"(?s)broken \d.*broken \d") as caught:
        run_ranks(fail_on, 2, [0, 1])
    assert "Rank 0 raised" in str(caught.value)


def leave(how: str) -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL) if how == "signal" else os._exit(3)
    time.sleep(30)


@pytest.mark.parametrize(("how", "ending"), [("exit", "exit code 3"), ("signal", "killed by signal SIGKILL")])
def test_a_rank_that_dies(how: str, ending: str) -> None:
    with pytest.raises(RankError, match=f"Rank 1 died without a word, {ending}"):
        run_ranks(leave, 2, how)


def start_child() -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def test_children_of_a_rank_are_killed_with_it() -> None:
    (pid,) = run_ranks(start_child, 1)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and "sleep" in command_of(pid):
        time.sleep(0.02)
    assert "sleep" not in command_of(pid)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def unpicklable() -> Any:
    return lambda: None


def nested() -> None:
    run_ranks(echo, 1, Answer(1))


def crash_at_exit() -> int:
    threading.Thread(target=lambda: (time.sleep(0.2), os._exit(5))).start()
    return 1


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (unpicklable, r"(?s)Rank 0 raised:.*[Pp]ickle"),
        (nested, r"(?s)Rank 0 raised:.*worlds do not nest"),
        (crash_at_exit, "gave its answer, but then failed to end, exit code 5"),
    ],
)
def test_other_failures(function: Callable[[], Any], match: str) -> None:
    with pytest.raises(RankError, match=match):
        run_ranks(function, 1)


def test_worlds_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="defined inside a function"):
        run_ranks(lambda: None, 1)
    with pytest.raises(ValueError, match=r"3 rank\(s\) cannot be divided evenly into 2"):
        run_ranks(echo, 3, nodes=2)
    with pytest.raises(RuntimeError, match="only known inside a function"):
        rank_environment()


def test_an_interrupted_parent_leaves_no_rank(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            from accel_state.testing import run_ranks

            def work(path):
                open(f"{path}-{os.getpid()}", "w").close()
                time.sleep(1000)

            if __name__ == "__main__":
                run_ranks(work, 2, sys.argv[1])
            """
        )
    )
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "rank")], stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("rank-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    ranks = [int(path.name.split("-")[1]) for path in tmp_path.glob("rank-*")]
    assert len(ranks) == 2
    assert not any(command_of(pid) for pid in ranks)


def guarded(leak: Callable[[], Any]) -> str:
    """What the guard says of a test that does this."""
    guard = leak_guard()
    next(guard)
    leak()
    try:
        next(guard)
    except StopIteration:
        return ""
    except AssertionError as error:
        return str(error)
    raise RuntimeError("the guard did not end")


def test_the_guard_is_silent_about_what_is_clean() -> None:
    assert guarded(lambda: run_ranks(fail_on, 2, [])) == ""


def test_the_guard_finds_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "variable ACCEL_TEST: was None, is '1'" in guarded(lambda: monkeypatch.setenv("ACCEL_TEST", "1"))


def test_the_guard_finds_threads() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-over")
    assert "thread 'left-over'" in guarded(thread.start)
    stop.set()
    thread.join()
    assert guarded(threading.Thread(target=time.sleep, args=(0.05,)).start) == ""


def test_the_guard_finds_processes() -> None:
    children: list[subprocess.Popen[bytes]] = []
    text = guarded(lambda: children.append(subprocess.Popen(["sleep", "100"])))
    children[0].kill()
    children[0].wait()
    assert "sleep 100" in text


def test_the_guard_finds_and_closes_an_open_process() -> None:
    assert "open Process(rank 0 of 1, cpu" in guarded(lambda: Process.open(ProcessSettings(device="cpu")))
    assert not Process.is_open()


def start_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def test_the_guard_finds_and_ends_a_group() -> None:
    assert "a process group of 1" in guarded(start_group)
    assert not dist.is_initialized()
