"""What `accel checkpoint` finds, proves and removes, what it costs, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_parallel.checkpoint import About, Item, write_checkpoint
from accel_parallel.checkpoint.layout import previous_path
from accel_parallel.checkpoint.manifest import MANIFEST_NAME
from accel_parallel.checkpoint.staging import LocalStaging
from accel_parallel.checkpoint_commands import COMMANDS, main
from accel_parallel.checkpoint_commands.arguments import size_in_bytes
from accel_parallel.checkpoint_commands.places import Place, survey
from accel_parallel.checkpoint_commands.prune import plan_removal
from accel_parallel.checkpoint_commands.text import age_text, size_text
from accel_state.errors import CheckpointError, ConfigError

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command; its exit code and what it printed."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, capsys.readouterr().out

    return run


def write(folder: Path, step: int = 0) -> Path:
    weight = torch.full((4, 3), float(step))
    items = [
        Item("model", "model", {"weight": weight, "tied": weight, "bias": torch.zeros(2, dtype=torch.bfloat16)}),
        Item("scheduler", "scheduler", {"last_epoch": step}),
    ]
    about = About(step=step, strategy="ddp", mesh={"dp_replicate": 2}, world_size=2)
    return write_checkpoint(folder, items, about=about, sync=False)


def write_run(project: Path, count: int) -> list[Path]:
    return [write(project / "checkpoints" / f"checkpoint_{number}", number * 10) for number in range(count)]


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def states(folder: Path) -> dict[str, str]:
    return {place.name: place.state for place in survey(folder)}


# ls


def test_ls_names_every_kind_of_folder(tmp_path: Path, say: Say) -> None:
    first, second, _third = write_run(tmp_path, 3)
    shelf = first.parent
    write(shelf / "by hand")
    (shelf / "checkpoint_7").mkdir()
    (shelf / "notes").mkdir()
    text = (first / MANIFEST_NAME).read_text()
    (first / MANIFEST_NAME).write_text(text.replace('"step": 0', '"step": 1'))
    living = Path(LocalStaging(shelf / "checkpoint_8").begin(os.getpid()))
    dead = Path(LocalStaging(shelf / "checkpoint_9").begin(dead_pid()))
    other = dead.with_name(".checkpoint_6.tmp-elsewhere-1-00112233")
    other.mkdir()
    second.rename(previous_path(second))
    (shelf / ".checkpoint_0.removed").mkdir()

    assert states(tmp_path) == {
        "by hand": "complete",
        living.name: "being written",
        dead.name: "left behind",
        other.name: "of another host",
        ".checkpoint_0.removed": "left behind",
        "checkpoint_0": "damaged",
        ".checkpoint_1.previous": "set aside",
        "checkpoint_2": "complete",
        "checkpoint_7": "incomplete",
    }
    assert [place.name for place in survey(tmp_path) if place.is_latest] == ["checkpoint_2"]
    code, out = say("ls", tmp_path)
    assert code == 0
    assert out.splitlines()[-1].startswith("checkpoint_0: ")
    assert "is damaged: its checksum differs" in out
    (row,) = [line for line in out.splitlines() if line.startswith("*")]
    assert row.split()[1:] == ["checkpoint_2", "20", "just", "now", *row.split()[5:7], "2", "(dp_replicate=2)", "ddp",
                               "complete"]  # fmt: skip
    write(shelf / "checkpoint_1")
    assert states(tmp_path)["checkpoint_1"] == "complete"


def test_what_a_save_set_aside_is_latest_where_its_name_is_free(tmp_path: Path) -> None:
    *_, last = write_run(tmp_path, 2)
    last.rename(previous_path(last))
    (latest,) = [place for place in survey(tmp_path) if place.is_latest]
    assert (latest.name, latest.state, latest.number) == (".checkpoint_1.previous", "set aside", 1)


def test_ls_takes_a_project_its_checkpoints_and_one_of_them(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    first, *_ = write_run(tmp_path, 2)
    names = ["checkpoint_0", "checkpoint_1"]
    for folder in (tmp_path, first.parent):
        code, out = say("ls", folder, "--json")
        assert (code, [each["name"] for each in json.loads(out)]) == (0, names)
    assert [each["path"] for each in json.loads(say("ls", first, "--json")[1])] == [str(first)]
    monkeypatch.chdir(tmp_path)
    (entry, latest) = json.loads(say("ls", "--json")[1])
    assert (entry["step"], entry["is_latest"], latest["is_latest"]) == (0, False, True)
    assert entry["size_bytes"] == sum(path.stat().st_size for path in first.iterdir() if path.name != MANIFEST_NAME)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert say("ls", empty) == (0, f"No checkpoints under {empty}.\n")
    with pytest.raises(CheckpointError, match=r"`.*/nowhere` is no folder, so no checkpoint is there. Check"):
        say("ls", tmp_path / "nowhere")


def manifests_alone(shelf: Path, count: int) -> None:
    text = (write(shelf / "checkpoint_0") / MANIFEST_NAME).read_bytes()
    for number in range(1, count):
        (shelf / f"checkpoint_{number}").mkdir()
        (shelf / f"checkpoint_{number}" / MANIFEST_NAME).write_bytes(text)


def test_ls_of_two_thousand_checkpoints_is_quick(tmp_path: Path) -> None:
    manifests_alone(tmp_path, 2000)
    begin = time.perf_counter()
    assert len(survey(tmp_path)) == 2000
    assert time.perf_counter() - begin < 4.0  # about 0.5 s; machines that test are busy


# show


def test_show_says_what_is_in_it(tmp_path: Path, say: Say) -> None:
    write_run(tmp_path, 2)
    code, out = say("show", tmp_path)
    assert code == 0
    assert out.splitlines()[0] == str(tmp_path / "checkpoints" / "checkpoint_1")
    assert "  step       10" in out
    assert "  world      2 processes, dp_replicate=2" in out
    assert "weight" not in out
    data = json.loads(say("show", tmp_path, "--tensors", "--json")[1])
    assert data["items"]["scheduler"]["tensors"] == {}
    assert data["items"]["model"]["aliases"] == {"tied": "weight"}
    assert data["items"]["model"]["tensors"] == {
        "weight": {"dtype": "float32", "shape": [4, 3], "size_bytes": 48},
        "bias": {"dtype": "bfloat16", "shape": [2], "size_bytes": 4},
    }


def test_show_of_one_item_lists_files_and_tensors(tmp_path: Path, say: Say) -> None:
    folder = write(tmp_path / "one")
    _, out = say("show", folder, "--item", "model")
    assert "scheduler" not in out.partition("\n\n")[2]
    assert "tied is weight" in out
    assert "4x3" in out
    (record,) = json.loads((folder / MANIFEST_NAME).read_text())["files"]["model.safetensors"]["xxh3_128"].split()
    assert record in out
    with pytest.raises(ConfigError, match=r"`--item modle` is not in .*Did you mean .model.\? It holds model"):
        say("show", folder, "--item", "modle")


# verify


def test_verify_of_what_is_whole(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    folder = write(tmp_path / "one")
    (folder / "notes.txt").write_text("mine")
    code, out = say("verify", folder, "--jobs", 2)
    assert code == 0
    assert "2 files as written" in out
    assert "also there, and not of the checkpoint: notes.txt" in out


def test_verify_names_every_bad_file(tmp_path: Path, say: Say) -> None:
    good, flipped, cut, gone = (write(tmp_path / name) for name in ("good", "flipped", "cut", "gone"))
    for folder, name in ((flipped, "model.safetensors"), (flipped, "scheduler.json")):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    (cut / "model.safetensors").write_bytes(b"cut")
    (gone / "scheduler.json").unlink()
    code, out = say("verify", good, flipped, cut, gone)
    assert code == 1
    assert f"{flipped}: BAD, 2 of 2 files" in out
    assert "`model.safetensors` of `model`" in out
    assert "`scheduler.json` of `scheduler`" in out
    assert "has 3 bytes instead of" in out
    assert "is missing" in out
    assert say("verify", good)[0] == 0
    (good / MANIFEST_NAME).write_text("{")
    code, out = say("verify", good)
    assert code == 1
    assert "BAD" in out
    assert "is damaged" in out


def test_verify_shows_every_byte(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    from contextlib import contextmanager

    from accel_parallel.checkpoint_commands import verify

    seen: list[int] = []
    totals: list[int] = []

    @contextmanager
    def bar(total: int, what: str) -> Any:
        totals.append(total)
        yield seen.append

    monkeypatch.setattr(verify, "bytes_bar", bar)
    say("verify", write(tmp_path / "one"))
    assert totals == [sum(seen)]
    assert totals[0] > 0


# prune


def place(number: int, *, is_latest: bool = False) -> Place:
    return Place(Path(f"/run/checkpoint_{number}"), "complete", is_latest=is_latest)


@given(numbers=st.sets(st.integers(0, 60), min_size=1), keep=st.integers(1, 8), every=st.none() | st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_what_goes_is_old_and_what_stays_was_asked_for(numbers: set[int], keep: int, every: int | None) -> None:
    places = [place(number, is_latest=number == max(numbers)) for number in sorted(numbers, reverse=True)]
    plan = plan_removal(places, keep=keep, every=every)
    kept, gone = {each.number for each in plan.kept}, {each.number for each in plan.checkpoints}
    newest = set(sorted(numbers)[-keep:])
    assert kept | gone == numbers
    assert not kept & gone
    assert newest <= kept
    assert max(numbers) in kept
    assert kept - newest == {number for number in numbers - newest if every is not None and number % every == 0}


def test_prune_removes_old_ones_and_what_the_dead_left(tmp_path: Path, say: Say) -> None:
    folders = write_run(tmp_path, 5)
    shelf = folders[0].parent
    dead = Path(LocalStaging(shelf / "checkpoint_9").begin(dead_pid()))
    living = Path(LocalStaging(shelf / "checkpoint_8").begin(os.getpid()))
    named = write(shelf / "best")
    # The save that began last has removed what the dead one left.
    assert not dead.exists()
    dead = Path(LocalStaging(shelf / "checkpoint_9").begin(dead_pid()))
    code, out = say("prune", tmp_path, "--keep", 2, "--every", 2, "--dry-run")
    assert code == 0
    assert "would remove" in out
    assert all(folder.is_dir() for folder in [*folders, dead])
    code, out = say("prune", tmp_path, "--keep", 2, "--every", 2, "--yes")
    assert code == 0
    assert sorted(states(tmp_path)) == sorted([living.name, "best", *(f"checkpoint_{each}" for each in (0, 2, 3, 4))])
    assert named.is_dir()
    assert not dead.exists()
    assert "Nothing to remove: 4 complete checkpoints" in say("prune", tmp_path, "--keep", 2, "--every", 2, "--yes")[1]


def test_prune_keeps_the_latest_even_where_it_is_aside(tmp_path: Path, say: Say) -> None:
    *_, last = write_run(tmp_path, 3)
    last.rename(previous_path(last))
    say("prune", tmp_path, "--keep", 1, "--yes")
    assert states(tmp_path) == {".checkpoint_2.previous": "set aside"}


def test_prune_asks(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    write_run(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"would remove 1 folder and cannot ask.*nothing was removed. Give `--yes`"):
        say("prune", tmp_path, "--keep", 1)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert say("prune", tmp_path, "--keep", 1)[1].endswith("Nothing was removed.\n")
    assert len(states(tmp_path)) == 2
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert say("prune", tmp_path, "--keep", 1)[0] == 0
    assert states(tmp_path) == {"checkpoint_1": "complete"}


def test_prune_tells_what_could_not_be_removed(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    write_run(tmp_path, 2)

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("accel_parallel.checkpoint_commands.prune.discard", refuse)
    with pytest.raises(CheckpointError, match=r"1 could not be removed: `.*checkpoint_0` \(.*denied\). Make them"):
        say("prune", tmp_path, "--keep", 1, "--yes")


# Words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lst"], r"`accel checkpoint lst` is not a command. Did you mean 'ls'\? Use one of ls, show"),
        (["ls", "--jsn"], r"unrecognized arguments: --jsn. Did you mean '--json'\? `accel checkpoint ls --help` shows"),
        (["verify"], r"the following arguments are required: CHECKPOINT. `accel checkpoint verify --help`"),
        (["verify", "x", "--jobs", "0"], r"argument --jobs: '0' is no whole number of at least 1"),
        (["prune", "x", "--kee", "1"], r"the following arguments are required: --keep"),
        (["prune", "x", "--keep", "0"], r"'0' is no whole number of at least 1"),
        (["consolidate", "x", "y", "--max-shard-size", "big"], r"'big' is no size, which is written as 5GB or 512MiB"),
        (["diff", "x", "y", "--rtol", "-1"], r"'-1' is no tolerance"),
        (["convert", "x", "y", "--tie", "a"], r"'a' is no pair of names, written as NAME=OTHER"),
    ],
)
def test_wrong_words_are_refused(words: Sequence[str], message: str, say: Say) -> None:
    with pytest.raises(ConfigError, match=message):
        say(*words)


def test_help_teaches_by_examples(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = say("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2
    assert "usage: accel checkpoint COMMAND" in capsys.readouterr().err
    for name in COMMANDS:
        code, out = say(name, "--help")
        assert code == 0
        assert f"examples\n  accel checkpoint {name} " in out
        assert max(len(line) for line in out.splitlines()) <= 120


def test_what_reads_no_tensors_does_not_load_torch(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    script = (
        "import sys; from accel_parallel.checkpoint_commands import main\n"
        "for words in sys.argv[2:]: assert main([*words.split(), *([] if '-' in words else [sys.argv[1]])]) == 0\n"
        "assert main(['prune', sys.argv[1], '--keep', '1', '--yes']) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'loaded'\n"
    )
    words = ["ls", "show", "verify", *(f"{name} --help" for name in COMMANDS)]
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *words], check=True, timeout=60, capture_output=True)


def test_a_reader_that_goes_away_is_no_fault_of_the_disk(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    def fail(location: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("accel_parallel.checkpoint_commands.ls.survey", fail)
    with pytest.raises(BrokenPipeError):  # `accel` ends without a word then
        say("ls", tmp_path)


def test_an_error_of_the_disk_has_three_parts(tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    def fail(location: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accel_parallel.checkpoint_commands.ls.survey", fail)
    with pytest.raises(CheckpointError, match=r"`accel checkpoint ls` could not go on \(.*No space.*\). Correct that"):
        say("ls", tmp_path)


def test_sizes_and_ages_as_people_read_them() -> None:
    assert [size_text(size) for size in (0, 999, 1000, 12_345, 999_999, 5 * 10**9)] == [
        "0 B", "999 B", "1.00 kB", "12.3 kB", "1.00 MB", "5.00 GB",
    ]  # fmt: skip
    assert [age_text(age) for age in (-5, 59, 60, 7200, 86400 * 3)] == [
        "just now", "just now", "1 minute ago", "2 hours ago", "3 days ago",
    ]  # fmt: skip
    assert [size_in_bytes(text) for text in ("5", "5GB", "1.5 MiB", "2kb")] == [5, 5 * 10**9, 3 << 19, 2000]
