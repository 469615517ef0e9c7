"""Trackers by name, as objects, as classes, all of them, and from other packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import accel_track.registry
from accel_state.errors import ConfigError, MissingDependencyError
from accel_track import GeneralTracker, JsonlTracker, make_trackers, tracker_names


class Other(GeneralTracker):
    name = "other"

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None: ...


class Filed(Other):
    requires_logging_directory = True

    def __init__(self, directory: str) -> None:
        self.directory = directory


class EntryPoint:
    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.load = name, load


def _missing() -> Any:
    raise MissingDependencyError("vendor", purpose="the tracker 'vendor'")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packages that add a tracker each: one that works, one whose vendor is missing, one that takes our name."""
    points = [
        EntryPoint("other", lambda: Other),
        EntryPoint("vendor", _missing),
        EntryPoint("broken", lambda: dict),
        EntryPoint("jsonl", lambda: Other),
    ]
    monkeypatch.setattr(
        accel_track.registry, "entry_points", lambda *, group: points if group == "accel.trackers" else []
    )


def test_nothing_gives_nothing() -> None:
    assert make_trackers(None, "folder") == []
    assert make_trackers([], "folder") == []


def test_names_objects_and_classes(tmp_path: Path) -> None:
    mine = Other()
    by_name, same, by_class, filed = make_trackers(["jsonl", mine, Other, Filed], tmp_path)
    assert isinstance(by_name, JsonlTracker)
    assert by_name.directory == tmp_path
    assert same is mine
    assert isinstance(by_class, Other)
    assert isinstance(filed, Filed)
    assert filed.directory == tmp_path
    assert make_trackers(mine) == [mine]
    assert isinstance(make_trackers("jsonl", tmp_path)[0], JsonlTracker)


@pytest.mark.usefixtures("installed")
def test_other_packages_add_names_and_cannot_replace_ours(tmp_path: Path) -> None:
    assert tracker_names() == ["jsonl", "other", "vendor", "broken"]
    assert isinstance(make_trackers("other")[0], Other)
    assert isinstance(make_trackers("jsonl", tmp_path)[0], JsonlTracker)


def test_all_takes_what_is_installed_and_says_what_is_not(
    installed: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [each for each in accel_track.registry.entry_points(group="accel.trackers") if each.name != "broken"]
    monkeypatch.setattr(accel_track.registry, "entry_points", lambda *, group: points)
    with caplog.at_level(logging.INFO):
        made = make_trackers("all", tmp_path)
    assert [each.name for each in made] == ["jsonl", "other"]
    assert "leaves the tracker 'vendor' out, because its package is missing" in caplog.text


@pytest.mark.usefixtures("installed")
def test_a_name_whose_package_is_missing_is_an_error() -> None:
    with pytest.raises(MissingDependencyError, match=r"`vendor` is needed for the tracker 'vendor'"):
        make_trackers("vendor")


@pytest.mark.usefixtures("installed")
def test_an_entry_point_that_gives_no_tracker_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"A dict was given in `log_with`, which is no tracker: it has no name, start, log"
    ):
        make_trackers("broken")


def test_an_unknown_name_is_refused_with_the_nearest_and_the_list() -> None:
    with pytest.raises(
        ConfigError, match=r"`log_with='jsonll'` names no tracker.*Did you mean 'jsonl'\?.*jsonl.*'all'"
    ):
        make_trackers(["jsonll"], "folder")


def test_an_object_that_is_no_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"A int was given .* no name, start, log, finish.*GeneralTracker"):
        make_trackers(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ["jsonl", "all", Filed])
def test_a_tracker_that_needs_a_folder_is_refused_without_one(asked: Any) -> None:
    with pytest.raises(ConfigError, match=r"The tracker '(jsonl|Filed)' writes files, but no folder.*`project_dir`"):
        make_trackers(asked)
