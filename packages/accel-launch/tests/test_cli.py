from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from accel_launch import __version__
from accel_launch.cli import main
from accel_launch.commands import find_command
from accel_state.errors import ConfigError

ADDED = SimpleNamespace(HELP="Say how many words were given.", main=lambda argv: 40 + len(argv))

BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}


@pytest.fixture
def added_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands as other packages bring them, one of which cannot be imported."""
    points = [
        EntryPoint("count", "commands_of_a_test:ADDED", "accel.commands"),
        EntryPoint("broken", "no_such_module_here", "accel.commands"),
        EntryPoint("launch", "no_such_module_here", "accel.commands"),
    ]
    monkeypatch.setitem(sys.modules, "commands_of_a_test", SimpleNamespace(ADDED=ADDED))  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "accel.commands" else [])


@pytest.mark.usefixtures("added_commands")
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "  launch       Start a script" in text
        assert "  env          Show versions" in text
        assert "  count        Say how many words were given." in text
        assert "  broken       (not usable: No module named 'no_such_module_here')" in text


@pytest.mark.usefixtures("added_commands")
def test_an_added_command_is_run_with_its_words() -> None:
    assert main(["count", "a", "--b"]) == 42


@pytest.mark.usefixtures("added_commands")
def test_an_added_command_that_cannot_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["broken"]) == 2
    message = r"`accel broken` is brought by `no_such_module_here`, which cannot be imported here .*Install it again"
    with pytest.raises(ConfigError, match=message):
        find_command("broken")


def test_built_in_commands_are_found_without_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> NoReturn:
        raise AssertionError("scanned")

    monkeypatch.setattr(importlib.metadata, "entry_points", refuse)
    assert main(["launch", "--help"]) == 0
    assert main(["env", "--help"]) == 0


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lunch", "a.py"]) == 2
    assert "accel: `accel lunch` is not a command. Did you mean 'launch'? The commands" in capsys.readouterr().err


def test_no_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: accel COMMAND" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"accel-launch {__version__}\n"


def test_ctrl_c_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("accel_launch.cli.find_command", interrupt)
    assert main(["launch", "a.py"]) == 130


@pytest.mark.parametrize("words", [["--help"], ["env"], ["launch", "--help"]])
def test_a_reader_that_goes_away_is_no_fault(words: list[str]) -> None:
    command = [sys.executable, "-u", "-m", "accel_launch", *words]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def fail(words: object) -> NoReturn:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("accel_launch.cli.find_command", lambda name: SimpleNamespace(main=fail))
    with capfd.disabled(), pytest.raises(BrokenPipeError):
        main(["it"])


@pytest.mark.parametrize("words", [["--version"], ["env"]])
def test_there_may_be_no_standard_output(words: list[str]) -> None:
    command = f"{sys.executable} -m accel_launch {' '.join(words)} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
@pytest.mark.parametrize(("words", "code"), [(["--help"], 1), (["env"], 1), (["lunch"], 2)])
def test_an_output_that_is_full_is_told(words: list[str], code: int, unbuffered: list[str]) -> None:
    command = [sys.executable, *unbuffered, "-m", "accel_launch", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=BUFFERED, text=True, timeout=60, check=False
        )
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    if code == 1:
        assert "accel: Writing failed (No space left on device). Free" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_command_that_is_refused_while_the_output_is_full_tells_why() -> None:
    script = (
        "import sys; from types import SimpleNamespace; from accel_launch import cli\n"
        "from accel_state.errors import ConfigError\n"
        "def refused(words):\n"
        "    print('something')\n"
        "    raise ConfigError('It is refused.')\n"
        "cli.find_command = lambda name: SimpleNamespace(main=refused)\n"
        "sys.exit(cli.main(['it']))"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=BUFFERED, text=True, timeout=60, check=False
        )
    assert (done.stderr, done.returncode) == ("accel: It is refused.\n", 2)


def test_an_error_of_a_command_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: object) -> NoReturn:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("accel_launch.cli.find_command", lambda name: SimpleNamespace(main=fail))
    with pytest.raises(OSError, match="somewhere"):
        main(["it"])


def test_one_process_replaces_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    class ReplacedError(Exception):
        pass

    def replace(*call: Any) -> NoReturn:
        calls.append(call)
        raise ReplacedError

    monkeypatch.setattr(os, "execvpe", replace)
    (tmp_path / "a.py").touch()
    with pytest.raises(ReplacedError, match=r"^$"):
        main(["launch", "--num-processes", "1", "--mixed-precision", "bf16", str(tmp_path / "a.py"), "--x"])
    ((program, argv, env),) = calls
    assert (program, argv) == (sys.executable, (sys.executable, str(tmp_path / "a.py"), "--x"))
    assert "RANK" not in env
    assert "bf16" in env["ACCEL_RUN_CONFIG"]


@pytest.mark.parametrize("words", [["--help"], ["launch", "--help"]])
def test_help_is_quick(words: list[str]) -> None:
    """In CPU time, which a busy machine does not change; performance.md asks for 0.15 s."""
    code = "import sys, time; from accel_launch.cli import main; main(sys.argv[1:]); print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True, timeout=60)
    assert float(done.stdout.splitlines()[-1]) < 0.5


def test_dry_run_and_refusals_in_this_process(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").touch()
    assert main(["launch", "--dry-run", "--num-processes", "2", str(tmp_path / "train.py")]) == 0
    assert "2 of 2 process(es) would start" in capsys.readouterr().out
    assert main(["launch", "--dry-run", "-m", "pkg"]) == 0
    assert "-m pkg" in capsys.readouterr().out
    assert main(["launch", "--dry-run", "--no-python", "sh"]) == 0
    for words, message in (
        ([], "was given no script"),
        ([str(tmp_path / "tarin.py")], "Did you mean 'train.py'?"),
        ([str(tmp_path / "no" / "train.py")], "neither does its folder"),
        (["--no-python", "no-such-program"], "there is no program 'no-such-program'"),
    ):
        assert main(["launch", *words]) == 2
        assert message in capsys.readouterr().err
