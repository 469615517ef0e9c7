from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_launch.flags import FLAGS, read_command_line
from accel_launch.launch import help_text
from accel_launch.options import LaunchOptions
from accel_state.errors import ConfigError


def test_flags_are_these() -> None:
    """A snapshot: a change here is a change of the command line that users have written down."""
    assert [flag.usage for flag in FLAGS] == [
        "--num-processes N",
        "--cpu",
        "--multi-gpu",
        "--num-cpu-threads-per-process N",
        "--mixed-precision no|fp16|bf16",
        "--gradient-accumulation-steps N",
        "--project-dir DIR",
        "--num-machines N",
        "--machine-rank N",
        "--main-process-ip ADDRESS",
        "--main-process-port PORT",
        "--debug",
        "--timeout SECONDS",
        "--grace-period SECONDS",
        "--log-dir DIR",
        "--dry-run",
        "-q, --quiet",
        "-m, --module",
        "--no-python",
        "-h, --help",
    ]


def test_every_flag_sets_a_field_and_every_field_has_a_flag() -> None:
    assert {flag.field for flag in FLAGS} - {"dry_run", "help"} == set(LaunchOptions.__dataclass_fields__)


def test_help_shows_every_flag_examples_and_exit_codes() -> None:
    text = help_text()
    assert all(flag.usage in text for flag in FLAGS)
    assert "examples" in text
    assert "exit codes" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "words",
    [
        ["--num-processes", "2", "--multi-gpu", "a.py"],
        ["--num_processes", "2", "--multi_gpu", "a.py"],
        ["--num_processes=2", "--multi-gpu", "--", "a.py"],
    ],
)
def test_both_spellings_and_equals(words: list[str]) -> None:
    line = read_command_line(words)
    assert line.given == {"num_processes": 2, "multi_gpu": True}
    assert line.script == "a.py"


@given(st.lists(st.text(max_size=8), max_size=5))
def test_everything_after_the_script_is_the_scripts(args: list[str]) -> None:
    line = read_command_line(["--num-processes", "2", "a.py", "--num-processes", "3", "-m", *args])
    assert line.given == {"num_processes": 2}
    assert line.args == ("--num-processes", "3", "-m", *args)


def test_short_flags() -> None:
    line = read_command_line(["-q", "-m", "pkg.mod", "-q"])
    assert line.given == {"quiet": True, "module": True}
    assert (line.script, line.args) == ("pkg.mod", ("-q",))


def test_negative_values_reach_the_check_of_the_value() -> None:
    assert read_command_line(["--num-processes", "-1", "a.py"]).given == {"num_processes": -1}


def test_the_same_value_twice_is_no_contradiction() -> None:
    assert read_command_line(["--cpu", "--cpu", "--num-processes=2", "--num-processes=2"]).given == {
        "cpu": True,
        "num_processes": 2,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-procesess", "2"], r"`--num-procesess` is not a flag .*Did you mean '--num-processes'\?.*--help"),
        (["--num_proc", "2"], r"`--num_proc` is not a flag.*Did you mean '--num-processes'"),
        (["-x"], r"`-x` is not a flag"),
        (["--cpu=1"], r"`--cpu=1`: .* takes no value. Write `--cpu`"),
        (["--num-processes"], r"last word of the command line, but it needs a value. Write `--num-processes N`"),
        (["--num-processes", "two"], r"'two' is not a whole number.*`--num-processes 4`"),
        (["--timeout", "soon"], r"'soon' is not a number.*`--timeout 600`"),
        (["--mixed-precision", "bf61"], r"`--mixed-precision bf61` is not.*Did you mean 'bf16'.*no, fp16, bf16"),
        (["--num-processes", "2", "--num_processes=4"], r"given twice, as 2 and as 4.*Remove one"),
    ],
)
def test_what_cannot_be_read_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_command_line([*words, *([] if words[-1] == "--num-processes" else ["a.py"])])


def test_no_script() -> None:
    line = read_command_line(["--cpu"])
    assert (line.script, line.args) == (None, ())


def test_a_value_that_is_not_equal_to_itself_is_no_second_one() -> None:
    with pytest.raises(ConfigError, match="`--timeout nan` is no time"):
        LaunchOptions(**read_command_line(["--timeout", "nan", "train.py"]).given)
