"""An environment that was made before an entry point was declared learns of it."""

from __future__ import annotations

import dataclasses

import pytest

import entry_points
from repository import packages


def test_this_environment_knows_what_is_declared() -> None:
    assert entry_points.stale(list(packages().values())) == []


def test_a_new_a_moved_and_a_dropped_entry_point_are_seen() -> None:
    package = packages()["accel-parallel"]
    groups = package.project["entry-points"]
    commands = groups["accel.commands"]
    changed = [
        {**groups, "accel.commands": {**commands, "one-more": "accel_parallel.more:main"}},
        {**groups, "accel.commands": dict.fromkeys(commands, "accel_parallel.elsewhere:main")},
        {group: entries for group, entries in groups.items() if group != "accel.commands"},
    ]
    for other in changed:
        declares = dataclasses.replace(package, project={**package.project, "entry-points": other})
        assert entry_points.stale([declares]) == [declares]
    absent = dataclasses.replace(package, project={**package.project, "name": "accel-absent"})
    assert entry_points.stale([absent]) == []


def test_only_those_are_installed_anew(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(entry_points.subprocess, "run", lambda command, check: ran.append(command))
    entry_points.main()
    assert (ran, capsys.readouterr().out) == ([], "")
    package = packages()["accel-parallel"]
    monkeypatch.setattr(entry_points, "stale", lambda members: [package])
    entry_points.main()
    assert ran[0][-2:] == ["--editable", str(package.folder)]
    assert "accel-parallel" in capsys.readouterr().out
