"""A rank that fails ends the launch, and only the failure that came first is told."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from accel_launch.cli import main

# Each rank writes a file when it is up, so that failures come in a known order.
PREAMBLE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def up():
    open(f"up{rank}", "w").close()
def wait(*ranks):
    while not all(os.path.exists(f"up{other}") for other in ranks):
        time.sleep(0.005)
"""


def tracebacks(text: str) -> int:
    return text.count("Traceback (most recent call last):")


def test_first_traceback_only(launcher: Any) -> None:
    """Rank 2 fails; the others fail a moment later of it, as ranks in a collective do."""
    script = launcher.script(
        PREAMBLE
        + """
if rank == 2:
    wait(0, 1, 3)
    print("before", file=sys.stderr)
    try:
        raise ValueError("the cause")
    except ValueError:
        import traceback; traceback.print_exc()
    up()
    time.sleep(0.3)  # it takes its time to end
    os._exit(3)
up()
wait(2)
raise ConnectionResetError("Connection reset by peer")
"""
    )
    done = launcher.run("--num-processes", "4", script)
    assert done.returncode == 3
    assert tracebacks(done.stderr) == 1
    assert "ValueError: the cause" in done.stderr
    assert "reset by peer" not in done.stderr
    assert done.stderr.index("before") < done.stderr.index("Traceback")
    last = done.stderr.splitlines()[-1]
    assert re.match(r"accel launch: rank 2 of 4 failed with exit code 3, running .*script.py\. ", last)
    assert "`--log-dir DIR` keeps them" in last


def test_a_cause_that_is_slow_to_end(launcher: Any) -> None:
    """Taking down process groups may last longer than the others take to notice; the cause is still the cause."""
    script = launcher.script(
        PREAMBLE
        + """
import atexit
if rank == 0:
    wait(1)
    atexit.register(time.sleep, 20)
    sys.excepthook = lambda *error: (sys.__excepthook__(*error), up())
    raise ValueError("the cause")
up()
wait(0)
time.sleep(1.5)
raise ConnectionError("Connection closed by peer")
"""
    )
    before = time.monotonic()
    done = launcher.run("--num-processes", "2", script)
    assert done.returncode == 1
    assert tracebacks(done.stderr) == 1, done.stderr
    assert "ValueError: the cause" in done.stderr
    assert "rank 0 of 2 failed with exit code 1" in done.stderr
    assert time.monotonic() - before < 15


def test_a_real_collective_that_loses_its_peer(launcher: Any) -> None:
    script = launcher.script("""
import torch, torch.distributed as dist
from accel_state import Process
process = Process.open()
dist.barrier()
if process.topology.rank == 1:
    raise KeyError("the cause")
dist.all_reduce(torch.ones(1))
""")
    done = launcher.run("--cpu", "--num-processes", "3", script)
    assert done.returncode == 1
    assert tracebacks(done.stderr) == 1, done.stderr
    assert "KeyError: 'the cause'" in done.stderr
    assert "rank 1 of 3 failed with exit code 1" in done.stderr


def test_others_tracebacks_are_in_the_log_folder(launcher: Any) -> None:
    script = launcher.script(
        PREAMBLE
        + """
signal.signal(signal.SIGTERM, lambda *args: 1 / 0)
up()
wait(0, 1)
if rank == 0:
    sys.exit("rank 0 has had enough")
time.sleep(30)
"""
    )
    done = launcher.run("--num-processes", "2", "--log-dir", "logs", script)
    assert done.returncode == 1
    assert tracebacks(done.stderr) == 0
    assert "rank 0 has had enough" in done.stderr
    assert "1 other process(es) of this launch were stopped. What every rank wrote is in logs." in done.stderr
    assert "ZeroDivisionError" in (launcher.folder / "logs/rank1.stderr.log").read_text()


def test_quiet_adds_no_words(launcher: Any) -> None:
    done = launcher.run("-q", "--num-processes", "2", launcher.script("import os; os._exit(4)"))
    assert (done.returncode, done.stderr) == (4, "")


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "SIGKILL (the machine may be out of memory"), (signal.SIGSEGV, "SIGSEGV (an")],
)
def test_a_rank_that_is_killed_is_named(launcher: Any, number: int, words: str) -> None:
    script = launcher.script(
        PREAMBLE
        + f"""
if rank == 1:
    wait(0)
    os.kill(os.getpid(), {number})
up()
time.sleep(30)
"""
    )
    done = launcher.run("--num-processes", "2", script)
    assert done.returncode == 128 + number
    assert f"rank 1 of 2 was killed by {words}" in done.stderr
    assert tracebacks(done.stderr) == 0


def test_a_rank_that_ignores_sigterm_is_killed_with_what_it_started(launcher: Any) -> None:
    script = launcher.script(
        PREAMBLE
        + """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    subprocess.Popen([sys.executable, "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('upchild', 'w'); time.sleep(60)"])
    while not os.path.exists("upchild"): time.sleep(0.005)
    up()
    time.sleep(60)
wait(0)
sys.exit(5)
"""
    )
    started = time.monotonic()
    done = launcher.run("--num-processes", "2", script)
    assert done.returncode == 5
    assert time.monotonic() - started < 20
    launcher.wait_for(lambda: not launcher.alive(), "end of every process", 2.0)


def test_a_traceback_that_a_living_rank_logs_is_shown(launcher: Any) -> None:
    script = launcher.script("""
import os, sys, time, traceback
def attempt():
    try: 1 / 0
    except ZeroDivisionError: traceback.print_exc()
if os.environ["RANK"] == "1":
    attempt()
    print("and on", file=sys.stderr)
    time.sleep(1.5)
""")
    done = launcher.run("--num-processes", "2", script)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr
    assert done.stderr.endswith("and on\n")
    done = launcher.run(
        "--num-processes",
        "2",
        launcher.script("import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()"),
    )
    assert tracebacks(done.stderr) == 2, "both ended well, so both are shown"


def test_a_handled_traceback_is_not_taken_for_the_cause(launcher: Any) -> None:
    """Rank 0 logs one and lives on; rank 1 fails half a second later without any."""
    script = launcher.script(
        PREAMBLE
        + """
import traceback
if rank == 0:
    wait(1)
    try: 1 / 0
    except ZeroDivisionError: traceback.print_exc()
    up()
    time.sleep(30)
up()
wait(0)
time.sleep(0.3)
os._exit(9)
"""
    )
    done = launcher.run("--num-processes", "2", script)
    assert done.returncode == 9
    assert "rank 1 of 2 failed with exit code 9" in done.stderr


# Ends from outside.

SLEEPER = PREAMBLE + "up()\ntime.sleep(60)\n"
STUBBORN = PREAMBLE + "for n in (2, 15): signal.signal(n, signal.SIG_IGN)\nup()\nwhile True: time.sleep(60)\n"


def slowness() -> float:
    """Seconds that a busy machine adds to every step: what 20 ms of sleep took beyond them, many times over."""
    start = time.monotonic()
    for _ in range(5):
        time.sleep(0.02)
    return 10 * (time.monotonic() - start - 0.1)


@pytest.mark.parametrize("script", [SLEEPER, STUBBORN], ids=["python", "stubborn"])
@pytest.mark.parametrize("to_group", [True, False])
def test_ctrl_c_ends_everything_within_2_s(launcher: Any, script: str, to_group: bool) -> None:
    process = launcher.start("--num-processes", "2", launcher.script(script))
    launcher.wait_for_files("up0", "up1")
    before = time.monotonic()
    if to_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGINT)
    launcher.wait_for(lambda: not launcher.alive(), "end of every process", 10.0)
    assert time.monotonic() - before < 2.0 + slowness()
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert tracebacks(err) == 0
    assert err.startswith("accel launch: interrupted; 2 process(es) running ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_ends_from_outside(launcher: Any, number: signal.Signals, code: int) -> None:
    process = launcher.start("--num-processes", "2", launcher.script(SLEEPER))
    launcher.wait_for_files("up0", "up1")
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert f"ended by {number.name}" in err
    assert not launcher.alive()


def test_python_scripts_may_end_in_order_after_ctrl_c(launcher: Any) -> None:
    script = launcher.script(
        PREAMBLE
        + """
try:
    up()
    time.sleep(60)
except KeyboardInterrupt:
    open(f"saved{rank}", "w").close()
    print("saved", file=sys.stderr)
"""
    )
    process = launcher.start("--num-processes", "2", script)
    launcher.wait_for_files("up0", "up1")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    launcher.wait_for_files("saved0", "saved1")
    assert err.count("saved\n") == 2


SAVES = (
    PREAMBLE
    + """
def save(*args):
    time.sleep(2.5)
    open(f"saved{rank}", "w").close()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
up()
time.sleep(60)
"""
)


@pytest.mark.parametrize("grace", [None, "20"])
def test_a_grace_period_leaves_time_for_a_last_checkpoint(launcher: Any, grace: str | None) -> None:
    flags = [] if grace is None else ["--grace-period", grace]
    process = launcher.start("--num-processes", "2", *flags, launcher.script(SAVES))
    launcher.wait_for_files("up0", "up1")
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not launcher.alive()
    if grace is None:
        assert not (launcher.folder / "saved0").exists()
    else:
        launcher.wait_for_files("saved0", "saved1")
        assert time.monotonic() - before < 15  # it does not wait longer than it has to


def test_other_signals_are_passed_on_and_end_nothing(launcher: Any) -> None:
    script = launcher.script(
        PREAMBLE
        + """
signal.signal(signal.SIGUSR1, lambda *args: open(f"told{rank}", "w").close())
up()
wait("go")
"""
    )
    process = launcher.start("--num-processes", "2", script)
    launcher.wait_for_files("up0", "up1")
    process.send_signal(signal.SIGUSR1)
    launcher.wait_for_files("told0", "told1")
    (launcher.folder / "upgo").touch()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_ctrl_c_twice_does_not_wait(launcher: Any) -> None:
    process = launcher.start("--num-processes", "2", launcher.script(STUBBORN))
    launcher.wait_for_files("up0", "up1")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    before = time.monotonic()
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - before < 0.6 + slowness()


def test_nohup_is_respected(launcher: Any) -> None:
    script = launcher.script(PREAMBLE + "up()\nwait('go')\n")
    process = launcher.start(
        "--num-processes", "2", script, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    launcher.wait_for_files("up0", "up1")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    (launcher.folder / "upgo").touch()
    process.communicate(timeout=10)
    assert process.returncode == 0


def test_a_killed_launcher_leaves_no_process(launcher: Any) -> None:
    """Not even those that workers have started and that ignore every polite signal."""
    script = launcher.script(
        PREAMBLE
        + """
import subprocess
for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", f"import time; open('upchild{rank}', 'w'); time.sleep(60)"])
up()
time.sleep(60)
"""
    )
    process = launcher.start("--num-processes", "2", script)
    launcher.wait_for_files("up0", "up1", "upchild0", "upchild1")
    assert len(launcher.alive()) == 6  # launcher, guard, workers, children
    process.kill()
    launcher.wait_for(lambda: not launcher.alive(), "end of every process", 10.0)
    process.communicate(timeout=10)


def test_a_killed_guard_does_not_disturb(launcher: Any) -> None:
    process = launcher.start("--num-processes", "2", launcher.script(PREAMBLE + "up()\nwait('go')\n"))
    launcher.wait_for_files("up0", "up1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    (launcher.folder / "upgo").touch()
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == 0


# On a terminal.


def read_terminal(fd: int, until: str, timeout_s: float = 30.0) -> str:
    text, deadline = "", time.monotonic() + timeout_s
    while until not in text and time.monotonic() < deadline:
        ready, _, _ = select.select([fd], [], [], 0.1)
        if ready:
            try:
                text += os.read(fd, 65536).decode()
            except OSError:
                break
    return text


def test_progress_bars_are_live_on_a_terminal(launcher: Any) -> None:
    script = launcher.script(
        PREAMBLE
        + """
tty = sys.stderr.isatty()
if rank == 0:
    sys.stderr.write(f"\\r tty {tty} {os.get_terminal_size(2).columns} wide"); sys.stderr.flush()
    up()
wait("go")
"""
    )
    main_end, worker_end = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(main_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 77, 0, 0))
    process = launcher.start("--num-processes", "2", script, stderr=worker_end)
    os.close(worker_end)
    assert "\r tty True 77 wide" in read_terminal(main_end, "wide"), "seen before the line, and the rank, ended"
    assert process.poll() is None
    (launcher.folder / "upgo").touch()
    process.communicate(timeout=10)
    os.close(main_end)
    assert process.returncode == 0


def test_without_a_terminal_lines_pass_unchanged(launcher: Any) -> None:
    script = launcher.script(
        "import sys, os\nif os.environ['RANK'] == '0': sys.stderr.write(f'{sys.stderr.isatty()}\\r10%\\r20%\\nno end')"
    )
    assert launcher.run("--num-processes", "2", script, text=False).stderr == b"False\r10%\r20%\nno end"


def test_a_reader_that_goes_away_ends_nothing(launcher: Any) -> None:
    script = launcher.script(PREAMBLE + "up()\nwait('go')\nprint('x' * 100000, file=sys.stderr)\n")
    read, write = os.pipe()
    process = launcher.start("--num-processes", "2", script, stderr=write)
    os.close(write)
    launcher.wait_for_files("up0", "up1")
    os.close(read)
    (launcher.folder / "upgo").touch()
    process.communicate(timeout=10)
    assert process.returncode == 0


# In this process, which is where coverage sees it.


def test_in_process_success(launcher: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(launcher.folder)
    before = signal.getsignal(signal.SIGINT)
    assert (
        main(
            ["launch", "--num-processes", "2", "--log-dir", "logs", launcher.script("import os; os.write(1, b'hi\\n')")]
        )
        == 0
    )
    assert capfd.readouterr().out == "hi\nhi\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_in_process_failure(launcher: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(launcher.folder)
    script = launcher.script(PREAMBLE + "up()\nwait(0, 1)\nif rank: raise ValueError('no')\ntime.sleep(30)\n")
    assert main(["launch", "--num-processes", "2", script]) == 1
    err = capfd.readouterr().err
    assert tracebacks(err) == 1
    assert "rank 1 of 2 failed with exit code 1" in err


def test_in_process_interruption(
    launcher: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank plays the user: it interrupts the launcher, and once more."""
    monkeypatch.chdir(launcher.folder)
    script = launcher.script(
        PREAMBLE
        + """
for number in (2, 15): signal.signal(number, signal.SIG_IGN)
up()
wait(0, 1)
if rank == 0:
    os.kill(os.getppid(), signal.SIGWINCH)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.2)
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(30)
"""
    )
    assert main(["launch", "--num-processes", "2", script]) == 130
    assert "interrupted; 2 process(es)" in capfd.readouterr().err
