"""Releases one package: version, changelog, commit, tag. ``hatch run release accel-data minor [--dry-run]``.

The new version is the old one raised in its ``major``, ``minor`` or ``patch`` place, a version given in full, or, with
``none``, the one that stands there already (a first release). Nothing is changed unless all of this holds:

- the working tree is clean and the tag does not exist,
- the changelog's first section is marked ``(unreleased)``,
- every sibling that declares the package admits the new version.

Then ``hatch version`` writes the version, the changelog section gets the version and the date, one commit holds both
and ``<distribution>-v<version>`` tags it. Pushing is left to whoever runs this.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from repository import ROOT, Package, packages

__all__ = ["ReleaseError", "bump", "date_changelog", "plan_release", "refusing_siblings"]

PLACES = ("major", "minor", "patch")


class ReleaseError(Exception):
    """The release cannot be made: what was asked for, why not, what to change."""


def bump(version: str, part: str) -> str:
    """The version after `version` at that place; ``none`` gives it back, a version in full must be newer.

    Raises:
        ReleaseError: where `part` is neither a place nor a newer version.
    """
    if part == "none":
        return version
    old = Version(version)
    if part in PLACES:
        numbers = [old.major, old.minor, old.micro]
        place = PLACES.index(part)
        return ".".join(map(str, [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)]))
    try:
        new = Version(part)
    except InvalidVersion:
        raise ReleaseError(
            f"`{part}` is neither major, minor, patch, none nor a version such as 1.2.0. Give one of those."
        ) from None
    if new <= old:
        raise ReleaseError(f"`{part}` is not newer than the present version {version}. Give a newer one.")
    return str(new)


def refusing_siblings(name: str, version: str, known: dict[str, Package]) -> list[tuple[str, str]]:
    """The siblings whose declared range does not admit `version`, each with its requirement."""
    found = []
    for sibling in known.values():
        requirement = sibling.requirements.get(name)
        if requirement is not None and not Requirement(requirement).specifier.contains(version, prereleases=True):
            found.append((sibling.name, requirement))
    return found


def date_changelog(text: str, version: str, date: str) -> str:
    """The changelog with its first section released: ``## 0.2.0 (unreleased)`` → ``## 0.2.0 (2026-01-31)``.

    Raises:
        ReleaseError: where the first section is released already, or says nothing.
    """
    heading = re.search(r"^## .*$", text, flags=re.MULTILINE)
    if heading is None or not heading[0].endswith("(unreleased)"):
        raise ReleaseError(
            f"The changelog begins with `{heading[0] if heading else 'no section'}`, "
            f"so nothing is waiting for a release. Describe the changes under a heading `## {version} (unreleased)`."
        )
    section = re.split(r"^## ", text[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    if not section.strip():
        raise ReleaseError(f"The section `{heading[0]}` is empty. Say what {version} changes before releasing it.")
    return f"{text[: heading.start()]}## {version} ({date}){text[heading.end() :]}"


@dataclass(frozen=True)
class Release:
    """What will be done."""

    package: Package
    version: str
    changelog: str
    """Its new text."""

    @property
    def tag(self) -> str:
        """Name of the tag."""
        return f"{self.package.name}-v{self.version}"


def plan_release(name: str, part: str, *, root: Path, date: str) -> Release:
    """Check everything that can be checked in the files. Changes nothing.

    Raises:
        ReleaseError: naming the first thing that is in the way.
    """
    known = packages(root)
    if name not in known:
        raise ReleaseError(f"`{name}` is no package of this repository. The packages are {', '.join(known)}.")
    package = known[name]
    version = bump(package.version, part)
    refusing = refusing_siblings(name, version, known)
    if refusing:
        ranges = "; ".join(f"{sibling} declares `{requirement}`" for sibling, requirement in refusing)
        raise ReleaseError(
            f"{name} {version} would not be admitted by its siblings: {ranges}. Check that they work with it, "
            f"widen their ranges in pyproject.toml, commit, and release them too."
        )
    text = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    return Release(package, version, date_changelog(text, version, date))


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise ReleaseError(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


def refuse_unready(release: Release, root: Path) -> None:
    """Look at the repository's state.

    Raises:
        ReleaseError: where the working tree holds changes, or the tag exists.
    """
    changed = _git(root, "status", "--porcelain")
    if changed:
        raise ReleaseError(f"The working tree holds changes, which a release must not sweep in:\n{changed}\nCommit it.")
    if _git(root, "tag", "--list", release.tag):
        raise ReleaseError(f"The tag {release.tag} exists already. Release a newer version.")


def execute(release: Release, root: Path) -> None:
    """Write the version and the changelog, commit both and tag the commit."""
    package = release.package
    if release.version != package.version:
        subprocess.run(
            ["hatch", "version", release.version], cwd=package.folder, check=True, timeout=300, stdin=subprocess.DEVNULL
        )
    changelog = package.folder / "CHANGELOG.md"
    changelog.write_text(release.changelog, encoding="utf-8")
    paths = [str(package.version_file.relative_to(root)), str(changelog.relative_to(root))]
    _git(root, "add", *paths)
    _git(root, "commit", "--message", f"Release {package.name} {release.version}", "--", *paths)
    _git(root, "tag", "--annotate", release.tag, "--message", f"{package.name} {release.version}")


def main(arguments: list[str] | None = None, *, root: Path = ROOT) -> int:
    """Plan, and carry out unless only a plan was asked for. 1 where something is in the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="distribution, such as accel-data")
    parser.add_argument("part", help="major, minor, patch, none, or a version in full")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and do nothing")
    given = parser.parse_args(arguments)
    try:
        release = plan_release(given.package, given.part, root=root, date=datetime.date.today().isoformat())
        print(f"{release.package.name}: {release.package.version} -> {release.version}, tag {release.tag}")
        if given.dry_run:
            return 0
        refuse_unready(release, root)
        execute(release, root)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print(f"Committed and tagged. Publish it: git push origin HEAD {release.tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
