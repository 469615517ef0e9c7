"""What each package's environment holds is worked out from the declared dependencies."""

from __future__ import annotations

from pathlib import Path

from alone import needed_siblings, third_parties
from coverage_report import Row, below_floor, rows
from repository import Package, packages


def package(name: str, *dependencies: str) -> Package:
    return Package(Path(name), {"name": name, "dependencies": list(dependencies)})


KNOWN = {
    each.name: each
    for each in (
        package("accel", "torch>=2.6", "accel-data>=0.1,<0.2"),
        package("accel-data", "accel-state>=0.1,<0.2", "Sorted_Containers>=2"),
        package("accel-state", "torch>=2.6", "tqdm>=4", "numpy>=1"),
        package("accel-track"),
    )
}


def test_siblings_are_followed_through_siblings() -> None:
    assert needed_siblings("accel", KNOWN) == ["accel", "accel-data", "accel-state"]
    assert needed_siblings("accel-track", KNOWN) == ["accel-track"]


def test_third_parties_are_those_declared_and_not_in_the_base() -> None:
    assert third_parties(["accel-data", "accel-state"], KNOWN) == ["Sorted_Containers>=2", "tqdm>=4"]
    assert third_parties(["accel-track"], KNOWN) == []


def test_every_package_of_the_repository_is_found() -> None:
    known = packages()
    assert sorted(known) == [
        "accel",
        "accel-bigmodel",
        "accel-data",
        "accel-launch",
        "accel-parallel",
        "accel-precision",
        "accel-state",
        "accel-track",
    ]
    for name, each in known.items():
        siblings = set(each.requirements) & set(known)
        assert siblings == ({*known} - {"accel"} if name == "accel" else {"accel-state"} - {name}), name


def summary(lines: int, covered: int) -> dict[str, dict[str, int]]:
    return {"summary": {"num_statements": lines, "covered_lines": covered}}


def test_coverage_is_summed_over_lines_and_held_to_its_floor() -> None:
    files = {"a/x.py": summary(90, 90), "a/sub/y.py": summary(10, 0), "b/z.py": summary(10, 5)}
    found = rows(files, ("a/*", "b/*", "c/*"))
    assert found == [Row("a/*", 100, 90), Row("b/*", 10, 5), Row("c/*", 0, 0)]
    assert below_floor(found) == ["b/*: 50.0 %, at least 90 % wanted", "c/*: matches no file that was measured"]
