"""No moment of a crash, and no failure of an object store, leaves a checkpoint that is not whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from accel_parallel.checkpoint import Checkpoint, Item, save_checkpoint
from accel_parallel.checkpoint import commit as commit_module
from accel_parallel.checkpoint import remote as remote_module
from accel_parallel.checkpoint.object_store import ObjectStore
from accel_parallel.checkpoint.remote import LEFTOVER_AGE_S, ORPHAN_AGE_S, RemoteFolder, RemoteStaging, place_of
from accel_parallel.checkpoint.shelf import LocalShelf, recover_at, shelf_of
from accel_state import CheckpointError, ConfigError, Process, ProcessSettings

RUN = "memory://bucket/run"
OPERATIONS = ("pipe_file", "open", "info", "cat_file", "find", "rm", "rm_file", "mv", "makedirs", "rmdir")


class Crash(BaseException):
    """The process has ended: nothing that it does afterwards has any effect."""


@pytest.fixture(autouse=True)
def store() -> Iterator[dict[str, Any]]:
    """What is in the memory that all tests share."""
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()


@pytest.fixture(autouse=True)
def _alone(store: dict[str, Any]) -> Iterator[None]:
    with Process.open(ProcessSettings(device="cpu")):
        yield


def save(final: str, step: int) -> None:
    items = [
        Item("model", "model", {"weight": torch.full((64,), float(step))}),
        Item("progress", "progress", {"step": step, "tensor": torch.tensor(step)}),
    ]
    save_checkpoint(final, items, process=Process.current(), step=step, strategy="any")


def saved_step(final: Any) -> int:
    """Reads everything, and checks that it is complete and of one save."""
    checkpoint = Checkpoint(final)
    assert set(checkpoint.items) == {"model", "progress"}
    progress = checkpoint.read("progress")
    steps = {checkpoint.manifest.step, progress["step"], progress["tensor"].item()}
    steps |= set(checkpoint.read("model")["weight"].tolist())
    assert len(steps) == 1, steps
    return int(steps.pop())


def places(store: dict[str, Any], final: str = RUN) -> set[str]:
    prefix = final.removeprefix("memory:/") + "/"
    return {place for name in store if name.startswith(prefix) and (place := place_of(name[len(prefix) :]))}


def only_one_place(store: dict[str, Any], final: str = RUN) -> bool:
    return places(store, final) == {Checkpoint(final).manifest.place}


@contextmanager
def later(seconds: float, *, dead: bool = True) -> Iterator[None]:
    """After this time, where every process of now is gone."""
    now = remote_module.time.time() + seconds
    with ExitStack() as stack:
        stack.enter_context(patch.object(remote_module.time, "time", lambda: now))
        if dead:
            stack.enter_context(patch.object(remote_module, "lives", lambda pid: False))
        yield


class Faults:
    """Counts what a save asks of the store, and strikes at one place."""

    def __init__(self, at: int | None, when: str, error: BaseException) -> None:
        self.at, self.when, self.error = at, when, error
        self.seen: list[str] = []
        self.is_over = False
        self.depth = 0

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if self.depth:  # the store's own doing
                return original(*args, **kwargs)
            if self.is_over:
                raise self.error
            number = len(self.seen)
            self.seen.append(name)
            if number == self.at and self.when == "before":
                self.strike()
            self.depth += 1
            try:
                answer = original(*args, **kwargs)
            finally:
                self.depth -= 1
            if number == self.at and self.when == "after":
                self.strike()
            return answer

        return operation

    def strike(self) -> None:
        self.is_over = isinstance(self.error, Crash)
        raise self.error

    @contextmanager
    def installed(self, owner: Any = MemoryFileSystem) -> Iterator[Faults]:
        with ExitStack() as stack:
            # One file after the other, so that the n-th operation is the same one each time.
            stack.enter_context(patch.object(commit_module, "NUM_THREADS", 1))
            for name in OPERATIONS:
                stack.enter_context(patch.object(owner, name, self.wrap(name, getattr(owner, name))))
            stack.enter_context(patch.object(MemoryFile, "write", self.wrap("write", MemoryFile.write)))
            yield self


def operations_of(final: str) -> list[str]:
    with Faults(None, "", Crash()).installed() as faults:
        save(final, 1)
    return faults.seen


def every_point(kind: str) -> list[tuple[int, str]]:
    if kind == "overwritten":
        save(RUN, 0)
    count = len(operations_of(RUN))
    MemoryFileSystem.store.clear()
    return [(number, when) for number in range(count) for when in ("before", "after")]


def struck(kind: str, at: int, when: str, error: BaseException) -> tuple[list[str], int | None]:
    """A save that is struck there; what it did, and the step of the checkpoint that is there afterwards."""
    MemoryFileSystem.store.clear()
    if kind == "overwritten":
        save(RUN, 0)
    with Faults(at, when, error).installed() as faults, suppress(Crash, CheckpointError, KeyboardInterrupt):
        save(RUN, 1)
    if not RemoteFolder(RUN).holds("manifest.json"):
        assert kind == "new"
        return faults.seen, None
    return faults.seen, saved_step(RUN)


@pytest.mark.parametrize("kind", ["new", "overwritten"])
def test_a_crash_anywhere_leaves_a_whole_checkpoint(store: dict[str, Any], kind: str) -> None:
    before = 0 if kind == "overwritten" else None
    outcomes = []
    for at, when in every_point(kind):
        seen, step = struck(kind, at, when, Crash())
        assert step in (before, 1)
        is_committed = "pipe_file" in seen and (len(seen) > seen.index("pipe_file") + 1 or when == "after")
        assert step == (1 if is_committed else before), (at, when)
        outcomes.append(step)
        left = places(store) - ({Checkpoint(RUN).manifest.place} if step is not None else set())
        save(RUN, 2)  # a run that goes on at once takes none of it for a leftover
        assert saved_step(RUN) == 2
        assert left <= places(store)
        with later(ORPHAN_AGE_S + 1):
            save(RUN, 3)
        assert saved_step(RUN) == 3
        assert only_one_place(store)
    assert set(outcomes) == {before, 1}


@pytest.mark.parametrize("kind", ["new", "overwritten"])
@pytest.mark.parametrize("error", [OSError("gone"), PermissionError("denied"), KeyboardInterrupt("Ctrl-C")])
def test_an_error_anywhere_leaves_a_whole_checkpoint(store: dict[str, Any], kind: str, error: BaseException) -> None:
    before = 0 if kind == "overwritten" else None
    for at, when in every_point(kind):
        seen, step = struck(kind, at, when, error)
        assert step in (before, 1), (at, when, seen)
        with later(ORPHAN_AGE_S + 1):
            save(RUN, 2)
        assert saved_step(RUN) == 2
        assert only_one_place(store)


def test_a_failed_save_takes_away_what_it_wrote(store: dict[str, Any]) -> None:
    save(RUN, 0)
    with (
        patch.object(MemoryFile, "write", side_effect=OSError("no room")),
        pytest.raises(CheckpointError, match=r"rank 0: OSError: no room.*earlier ones are untouched"),
    ):
        save(RUN, 1)
    assert saved_step(RUN) == 0
    assert only_one_place(store)


def test_a_manifest_whose_put_failed_after_it_was_done_keeps_its_files(store: dict[str, Any]) -> None:
    save(RUN, 0)
    pipe_file = MemoryFileSystem.pipe_file

    def put(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> None:
        pipe_file(self, *args, **kwargs)
        raise TimeoutError("no answer")

    with patch.object(MemoryFileSystem, "pipe_file", put), pytest.raises(CheckpointError, match="no answer"):
        save(RUN, 1)
    assert saved_step(RUN) == 1
    staging = RemoteStaging(RUN)  # also where another instance is asked to
    staging.abandon(f"{RUN}/{Checkpoint(RUN).manifest.place}")
    assert saved_step(RUN) == 1


def test_a_manifest_that_arrives_after_its_put_failed_finds_its_files(store: dict[str, Any]) -> None:
    save(RUN, 0)
    pipe_file = MemoryFileSystem.pipe_file
    on_the_way: list[tuple[Any, ...]] = []

    def put(*args: Any) -> None:
        on_the_way.append(args)
        raise TimeoutError("no answer")

    with patch.object(MemoryFileSystem, "pipe_file", put), pytest.raises(CheckpointError, match="no answer"):
        save(RUN, 1)
    assert saved_step(RUN) == 0
    pipe_file(*on_the_way[0])
    assert saved_step(RUN) == 1


def test_what_cannot_be_removed_after_the_commit_is_said_and_goes_later(
    store: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    save(RUN, 0)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PermissionError("DeleteObject is not allowed")

    with patch.object(MemoryFileSystem, "rm", refuse), patch.object(MemoryFileSystem, "rm_file", refuse):
        save(RUN, 1)
        assert "DeleteObject is not allowed" in caplog.text
        with later(LEFTOVER_AGE_S + 1):
            caplog.clear()
            save(RUN, 2)
        assert "What saves that are gone left" in caplog.text
    assert len(places(store)) == 3
    with later(LEFTOVER_AGE_S + 1, dead=False):
        save(RUN, 3)
    assert only_one_place(store)


def test_files_that_another_took_for_leftovers_are_not_committed(store: dict[str, Any]) -> None:
    save(RUN, 0)
    staging = RemoteStaging(RUN)
    token = staging.begin(os.getpid())
    record = staging.folder(token).write("a.json", [b"1"], sync=True)
    text = json.dumps({"files": {"a.json": {"size_bytes": record.size_bytes}}})
    with later(ORPHAN_AGE_S + 1):
        RemoteStaging(RUN).begin(os.getpid())
    with pytest.raises(CheckpointError, match=r"a\.json of `memory://bucket/run` went before it was complete"):
        staging.publish(token, text, sync=True)
    assert saved_step(RUN) == 0


def test_what_is_given_up_goes_or_is_said_to_stay(store: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    staging = RemoteStaging(RUN)
    token = staging.begin(os.getpid())
    folder = staging.folder(token)
    for name in ("a", "b"):
        folder.write(name, [b"1"], sync=True)
    staging.remove(token, "a")
    staging.remove(token, "a")
    assert [name.rpartition("/")[2] for name in store] == ["b"]
    with patch.object(MemoryFileSystem, "find", side_effect=OSError("no answer")):
        staging.abandon(token)
    assert "What was written of memory://bucket/run was left there (no answer)" in caplog.text
    staging.abandon(token)
    assert not store


def test_saves_in_progress_are_left_alone(store: dict[str, Any]) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    host = remote_module._plain_host()
    now = int(remote_module.time.time())
    alive = [
        f"files-{now}-{host}-{child.pid}-0123abcd",
        f"files-{now - 3600}-{host}-{os.getpid()}-0123abcd",
        f"files-{now - 3600}-else-where-{child.pid}-0123abcd",
    ]
    dead = [
        f"files-{now - int(ORPHAN_AGE_S) - 60}-{host}-{child.pid}-0123abcd",
        f"files-{now - 25 * 3600}-{host}-{os.getpid()}-0123abcd",
        f"files-{now - 25 * 3600}-else-where-{child.pid}-0123abcd",
    ]
    for place in [*alive, *dead]:
        ObjectStore(RUN).put(f"{place}/model.safetensors", b"part")
    save(RUN, 0)
    assert places(store) == {*alive, Checkpoint(RUN).manifest.place}


# What else lies there


def test_objects_of_somebody_else_are_not_mixed_with(store: dict[str, Any]) -> None:
    store_of = ObjectStore(RUN)
    store_of.put("notes.txt", b"mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt and is no checkpoint.*Name another place"):
        save(RUN, 0)
    with pytest.raises(CheckpointError, match="an object of that very name"):
        save(f"{RUN}/notes.txt", 0)
    assert list(store) == ["/bucket/run/notes.txt"]


def test_notes_beside_a_manifest_stay(store: dict[str, Any]) -> None:
    save(RUN, 0)
    ObjectStore(RUN).put("notes.txt", b"mine")
    save(RUN, 1)
    assert saved_step(RUN) == 1
    assert ObjectStore(RUN).read("notes.txt") == b"mine"
    assert only_one_place(store)


def test_a_folder_that_was_copied_there_is_a_checkpoint_and_back(store: dict[str, Any], tmp_path: Path) -> None:
    save_to = tmp_path / "run"
    save(str(save_to), 5)
    fs = fsspec.filesystem("memory")
    fs.put(f"{save_to}/", "/bucket/run/", recursive=True)
    assert saved_step(RUN) == 5
    save(RUN, 6)
    assert saved_step(RUN) == 6
    assert [name for name in store if place_of(name.removeprefix("/bucket/run/")) is None] == [
        "/bucket/run/manifest.json"
    ]
    fs.get("/bucket/run/", f"{tmp_path / 'back'}/", recursive=True)
    assert saved_step(tmp_path / "back") == 6
    place = tmp_path / "back" / Checkpoint(tmp_path / "back").manifest.place
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        saved_step(tmp_path / "back")


def test_a_damaged_manifest_is_replaced_and_what_it_meant_waits(store: dict[str, Any]) -> None:
    save(RUN, 0)
    old = places(store)
    ObjectStore(RUN).put("manifest.json", b"{")
    with pytest.raises(CheckpointError, match=r"manifest\.json` is damaged"):
        Checkpoint(RUN)
    with later(ORPHAN_AGE_S + 1):  # not known whether it is meant
        save(RUN, 1)
        assert places(store) >= old
        save(RUN, 2)
    assert saved_step(RUN) == 2
    assert not places(store) & old


# Damage


def test_damage_is_named(store: dict[str, Any]) -> None:
    save(RUN, 0)
    place = f"{RUN}/{Checkpoint(RUN).manifest.place}"
    name = f"/bucket/run/{Checkpoint(RUN).manifest.place}/model.safetensors"
    whole = store[name].getvalue()
    for number in range(0, len(whole), 7):
        ObjectStore(place).put("model.safetensors", whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1 :])
        with pytest.raises(CheckpointError, match=r"`model\.safetensors` of `model` in .* has changed since"):
            Checkpoint(RUN).read("model")
    ObjectStore(place).put("model.safetensors", whole[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        Checkpoint(RUN).read("model")
    del store[name]
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint(RUN).read("model")
    assert Checkpoint(RUN).read("progress")["step"] == 0
    store[f"{name}/deeper"] = MemoryFile(data=b"x")
    with pytest.raises(CheckpointError, match="cannot be read as a plain file"):
        Checkpoint(RUN).read("model")
    with pytest.raises(CheckpointError, match=r"holds no `manifest\.json`"):
        Checkpoint("memory://bucket/nothing")


@pytest.mark.parametrize("place", ["../other", "a/b", "..", "/etc", 7])
def test_a_place_outside_is_refused(store: dict[str, Any], place: Any) -> None:
    save(RUN, 0)
    text = ObjectStore(RUN).read("manifest.json").decode()
    ObjectStore(RUN).put("manifest.json", remote_module.placed(text, place).encode())
    with pytest.raises(CheckpointError, match="lies outside the checkpoint's folder"):
        Checkpoint(RUN)


# Folders of numbered checkpoints


def test_numbered_checkpoints_of_a_store(store: dict[str, Any]) -> None:
    shelf = shelf_of(f"{RUN}/checkpoints/")
    assert (shelf.latest(), shelf.next_number(), shelf.complete()) == (None, 0, [])
    for number in (0, 1, 2, 9, 10):
        save(str(shelf.numbered(number)), number)
    ObjectStore(f"{RUN}/checkpoints").put("checkpoint_x/manifest.json", b"{}")
    assert [number for number, _ in shelf.complete()] == [0, 1, 2, 9, 10]
    assert shelf.latest() == f"{RUN}/checkpoints/checkpoint_10"
    assert shelf.next_number() == 11
    assert (shelf.holds(9), shelf.holds(8)) == (True, False)
    removed = shelf.prune(total_limit=2, keep=[f"{RUN}/checkpoints/checkpoint_1/"])
    assert removed == [f"{RUN}/checkpoints/checkpoint_{number}" for number in (0, 2)]
    assert [number for number, _ in shelf.complete()] == [1, 9, 10]
    assert not any("checkpoint_0/" in name or "checkpoint_2/" in name for name in store)
    with pytest.raises(ConfigError, match="total_limit=0"):
        shelf.prune(total_limit=0)
    recover_at(RUN)


def test_the_crash_of_a_first_save_is_no_broken_checkpoint(store: dict[str, Any]) -> None:
    shelf = shelf_of(RUN)
    with Faults(8, "before", Crash()).installed(), pytest.raises(Crash):
        save(str(shelf.numbered(0)), 0)
    assert places(store, f"{RUN}/checkpoint_0")
    assert shelf.latest() is None
    assert shelf.next_number() == 1
    save(str(shelf.numbered(1)), 1)
    shelf.prune(total_limit=1)
    assert places(store, f"{RUN}/checkpoint_0")  # perhaps it is still being written
    with later(ORPHAN_AGE_S + 1):
        shelf.prune(total_limit=1)
    assert not places(store, f"{RUN}/checkpoint_0")
    assert saved_step(shelf.latest()) == 1
    ObjectStore(f"{RUN}/other").put("checkpoint_3/model.safetensors", b"")
    with pytest.raises(CheckpointError, match=r"holds checkpoint_3, and none of them has a `manifest\.json`"):
        shelf_of(f"{RUN}/other").latest()


def test_a_crash_while_pruning_never_leaves_half_a_checkpoint(store: dict[str, Any]) -> None:
    shelf = shelf_of(RUN)
    for at in range(6):
        for when in ("before", "after"):
            store.clear()
            for number in range(3):
                save(str(shelf.numbered(number)), number)
            with Faults(at, when, Crash()).installed() as faults:
                try:
                    shelf.prune(total_limit=1)
                except Crash:
                    assert faults.is_over
            for number, final in shelf.complete():
                assert saved_step(final) == number
            assert saved_step(shelf.latest()) == 2
            with later(ORPHAN_AGE_S + 1):
                shelf.prune(total_limit=1)
            assert {name.split("/")[3] for name in store} == {"checkpoint_2"}


def test_numbered_checkpoints_of_a_disk_are_those_of_the_layout(tmp_path: Path) -> None:
    shelf = shelf_of(f"file://{tmp_path}")
    assert isinstance(shelf, LocalShelf)
    for number in range(3):
        save(str(shelf.numbered(number)), number)
    assert shelf.location == tmp_path
    assert shelf.complete() == [(number, tmp_path / f"checkpoint_{number}") for number in range(3)]
    assert shelf.latest() == tmp_path / "checkpoint_2"
    assert (shelf.next_number(), shelf.holds(1), shelf.holds(3)) == (3, True, False)
    assert shelf.prune(total_limit=1, keep=[RUN, tmp_path / "checkpoint_0"]) == [tmp_path / "checkpoint_1"]
    (tmp_path / "checkpoint_0").rename(tmp_path / ".checkpoint_0.previous")
    recover_at(f"file://{tmp_path}/checkpoint_0")
    assert saved_step(tmp_path / "checkpoint_0") == 0


# Stores where a put is not whole


class SlowDisk(LocalFileSystem):
    """What no list of object stores knows."""

    protocol = "slowdisk"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).replace("slowdisk://", "file://")))


@pytest.mark.parametrize("kind", ["new", "overwritten"])
def test_elsewhere_a_manifest_is_moved_to_its_name(tmp_path: Path, kind: str) -> None:
    fsspec.register_implementation("slowdisk", SlowDisk, clobber=True)
    final = f"slowdisk://{tmp_path}/run"
    with Faults(None, "", Crash()).installed(SlowDisk) as faults:
        if kind == "overwritten":
            save(final, 0)
        before = len(faults.seen)
        save(final, 1)
    assert faults.seen.count("mv") == (2 if kind == "overwritten" else 1)
    for at in range(len(faults.seen) - before):
        shutil.rmtree(tmp_path / "run")
        if kind == "overwritten":
            save(final, 0)
        with Faults(at, "before", Crash()).installed(SlowDisk), pytest.raises(Crash):
            save(final, 1)
        if RemoteFolder(final).holds("manifest.json"):
            assert saved_step(final) in (0, 1)
        else:
            assert kind == "new"
        with later(ORPHAN_AGE_S + 1):
            save(final, 2)
        assert saved_step(final) == 2
        # An empty folder may stay, where objects have none.
        left = {path.parent.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert left == {"run", Checkpoint(final).manifest.place}


def test_elsewhere_folders_go_with_what_was_in_them(tmp_path: Path) -> None:
    fsspec.register_implementation("slowdisk", SlowDisk, clobber=True)
    shelf = shelf_of(f"slowdisk://{tmp_path}/shelf")
    for number in range(3):
        save(str(shelf.numbered(number)), number)
    (tmp_path / "shelf" / "checkpoint_1" / "notes").mkdir()
    shelf.prune(total_limit=1)
    assert sorted(os.listdir(tmp_path / "shelf")) == ["checkpoint_1", "checkpoint_2"]
    assert os.listdir(tmp_path / "shelf" / "checkpoint_1") == ["notes"]
    refused = OSError("cannot be moved")
    with patch.object(SlowDisk, "mv", side_effect=refused), pytest.raises(CheckpointError, match="cannot be moved"):
        save(str(shelf.numbered(2)), 3)
    assert saved_step(shelf.latest()) == 2
