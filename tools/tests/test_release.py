"""Releases in a small repository of three packages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from release import ReleaseError, bump, date_changelog, main, plan_release

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "{name}"
dynamic = ["version"]
dependencies = [{dependencies}]

[tool.hatch.version]
path = "src/{module}/_version.py"

[tool.hatch.envs.default]
skip-install = true
"""


CHANGELOG = """\
# Changelog

## 0.1.1 (unreleased)

- News.

## 0.1.0 (2026-01-01)

- First.
"""


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name, dependencies in [
        ("accel", '"accel-data>=0.1,<0.2", "accel-state>=0.1,<0.2"'),
        ("accel-data", '"accel-state>=0.1,<0.2"'),
        ("accel-state", ""),
    ]:
        folder = tmp_path / "packages" / name
        module = name.replace("-", "_")
        (folder / "src" / module).mkdir(parents=True)
        (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name, module=module, dependencies=dependencies))
        (folder / "src" / module / "_version.py").write_text('__version__ = "0.1.0"\n')
        (folder / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.name", "Tester")
    git(tmp_path, "config", "user.email", "tester@example.invalid")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "Start")
    return tmp_path


def test_patch_is_written_committed_and_tagged(repository: Path) -> None:
    assert main(["accel-data", "patch"], root=repository) == 0
    assert git(repository, "tag") == "accel-data-v0.1.1\n"
    assert git(repository, "status", "--porcelain") == ""
    changed = git(repository, "show", "--name-only", "--format=%s", "HEAD").split("\n")
    assert changed[0] == "Release accel-data 0.1.1"
    assert sorted(filter(None, changed[1:])) == [
        "packages/accel-data/CHANGELOG.md",
        "packages/accel-data/src/accel_data/_version.py",
    ]
    assert plan_release("accel-state", "none", root=repository, date="2026-01-01").version == "0.1.0"
    changelog = (repository / "packages/accel-data/CHANGELOG.md").read_text()
    assert re.search(r"^## 0\.1\.1 \(\d{4}-\d\d-\d\d\)$", changelog, re.MULTILINE)


def test_sibling_and_its_range_are_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accel-state", "minor"], root=repository) == 1
    said = capsys.readouterr().err
    assert "accel declares `accel-state>=0.1,<0.2`" in said
    assert "accel-data declares `accel-state>=0.1,<0.2`" in said
    assert git(repository, "tag") == ""
    assert git(repository, "status", "--porcelain") == ""


def test_nobody_needs_the_top_package_so_any_version_is_admitted(repository: Path) -> None:
    assert plan_release("accel", "major", root=repository, date="2026-01-01").tag == "accel-v1.0.0"


def test_dry_run_changes_nothing(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accel-data", "patch", "--dry-run"], root=repository) == 0
    assert "accel-data: 0.1.0 -> 0.1.1, tag accel-data-v0.1.1" in capsys.readouterr().out
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "tag") == ""


def test_changes_in_the_working_tree_are_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "stray.txt").write_text("x")
    assert main(["accel-data", "patch"], root=repository) == 1
    assert "stray.txt" in capsys.readouterr().err
    assert 'version__ = "0.1.0"' in (repository / "packages/accel-data/src/accel_data/_version.py").read_text()


def test_a_version_is_released_once(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(repository, "tag", "accel-data-v0.1.1")
    assert main(["accel-data", "patch"], root=repository) == 1
    assert "accel-data-v0.1.1 exists already" in capsys.readouterr().err


def test_unknown_package_is_refused(repository: Path) -> None:
    with pytest.raises(ReleaseError, match=r"`accel-dta` is no package.*accel, accel-data, accel-state"):
        plan_release("accel-dta", "patch", root=repository, date="2026-01-01")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("# Changelog\n", "begins with `no section`"),
        ("# Changelog\n\n## 0.1.0 (2026-01-01)\n\n- First.\n", "nothing is waiting"),
        ("# Changelog\n\n## 0.1.1 (unreleased)\n\n## 0.1.0 (2026-01-01)\n\n- First.\n", "is empty"),
    ],
)
def test_changelog_that_says_nothing_new_is_refused(text: str, match: str) -> None:
    with pytest.raises(ReleaseError, match=match):
        date_changelog(text, "0.1.1", "2026-02-03")


@pytest.mark.parametrize("part", ["mayor", "0.1.0", "0.0.9"])
def test_part_that_is_no_step_forward_is_refused(part: str) -> None:
    with pytest.raises(ReleaseError, match=r"neither major|not newer"):
        bump("0.1.0", part)


@given(st.tuples(*[st.integers(0, 50)] * 3), st.sampled_from(["major", "minor", "patch"]))
def test_bump_is_newer_and_zeroes_what_follows(numbers: tuple[int, int, int], part: str) -> None:
    old = ".".join(map(str, numbers))
    new = Version(bump(old, part))
    assert new > Version(old)
    place = ["major", "minor", "patch"].index(part)
    assert new.release[place] == numbers[place] + 1
    assert new.release[place + 1 :] == (0,) * (2 - place)
