"""What makes a table of losses wrong is found, and a table is read as it was written. Nothing is trained here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import losses
from losses import Curve, differences, differences_from_page

ONE = Curve(
    losses=(2.25, 1.5, 0.75, 0.5), norms=(0.1, 0.5, 2.0, 1.0), rates=(0.1, 0.2, 0.1, 0.05), correct=330, evaluated=359
)


def changed(values: tuple[float, ...], place: int, by: float) -> tuple[float, ...]:
    return tuple(value + by if index == place else value for index, value in enumerate(values))


def test_rounding_is_no_difference() -> None:
    other = replace(ONE, losses=changed(ONE.losses, 3, -9e-6), norms=changed(ONE.norms, 2, 1.9e-5), correct=331)
    assert differences(ONE, other) == []
    assert differences(ONE, ONE) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": changed(ONE.losses, 1, 1.1e-5)}, "losses differ by up to 1.1e-05"),
        ({"losses": changed(ONE.losses, 1, math.nan)}, "losses differ by up to inf"),
        ({"norms": changed(ONE.norms, 0, 1.1e-6)}, "norms differ by up to 1.1e-05 of themselves"),
        ({"norms": changed(ONE.norms, 0, math.inf)}, "norms differ by up to inf"),
        ({"rates": changed(ONE.rates, 2, 1e-12)}, "learning rates differ from step 3 on"),
        ({"correct": 328}, "328 images were read right, and 330"),
        ({"losses": ONE.losses[:3]}, "3 steps and 359 images, and one process had 4 and 359"),
        ({"evaluated": 360}, "4 steps and 360 images"),
    ],
)
def test_what_is_no_rounding_is_told(change: dict[str, Any], said: str) -> None:
    (told,) = differences(ONE, replace(ONE, **change))
    assert said in told


def page_with(curves: dict[str, Curve]) -> str:
    return f"above\n{losses.MARKS[0]}\n\n{losses.table(curves)}\n\n{losses.MARKS[1]}\n| zero1 | 2 |\n"


def test_a_table_is_as_the_page_that_holds_it() -> None:
    curves = {"one": ONE, "ddp": ONE, "zero3": replace(ONE, losses=changed(ONE.losses, 3, 9e-4), correct=332)}
    fresh = losses.table({"one": ONE, "ddp": ONE, "zero3": ONE})
    assert differences_from_page(fresh, page_with(curves)) == []
    assert differences_from_page(losses.table({"one": ONE}), page_with(curves)) == []  # some of its rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": changed(ONE.losses, 3, 2e-3)}, "ZeRO-3 on 2: a loss is 0.502000, and 0.500000 on the page"),
        ({"losses": changed(ONE.losses, 0, math.nan)}, "a loss is nan"),
        ({"correct": 333}, "333 images were read right, and 330 on the page"),
        ({"losses": (*ONE.losses, *ONE.losses)}, "no such row"),
    ],
)
def test_a_table_that_is_not_as_the_page_is_told(change: dict[str, Any], said: str) -> None:
    page = page_with({"one": ONE, "zero3": ONE})
    one = replace(ONE, losses=change["losses"]) if len(change.get("losses", ())) > 4 else ONE
    told = differences_from_page(losses.table({"one": one, "zero3": replace(ONE, **change)}), page)
    assert any(said in line for line in told)


def test_a_page_without_a_row_or_a_table_is_told() -> None:
    assert differences_from_page(losses.table({"one": ONE, "fsdp": ONE}), page_with({"one": ONE})) == [
        "FSDP2 on 2: the page has no such row of as many columns"
    ]
    (told,) = differences_from_page(losses.table({"one": ONE}), "| one process | 1 |")
    assert "run this without --check" in told


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Curve]:
    """What each run gives instead of training."""
    curves = dict.fromkeys(losses.RUNS, ONE)
    titles = {run.title: name for name, run in losses.RUNS.items()}
    monkeypatch.setattr(losses, "measure", lambda run, *, epochs: curves[titles[run.title]])
    monkeypatch.setattr(losses, "_has_deepspeed", lambda: True)
    monkeypatch.setattr(losses, "version", lambda package: "0")
    return curves


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text(f"above\n{losses.MARKS[0]}\nold\n{losses.MARKS[1]}\nbelow\n", encoding="utf-8")
    return file


def test_the_command_writes_what_it_then_finds_there(trained: dict[str, Curve], page: Path) -> None:
    assert losses.main(["--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    assert text.count("| DeepSpeed, ZeRO-") == 4
    assert losses.main(["--page", str(page), "--check"]) == 0
    assert page.read_text(encoding="utf-8") == text


def test_the_command_writes_no_table_that_is_wrong(
    trained: dict[str, Curve], page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = page.read_text(encoding="utf-8")
    trained["zero2"] = replace(ONE, losses=changed(ONE.losses, 1, 0.1))
    assert losses.main(["--page", str(page)]) == 1
    assert "DeepSpeed, ZeRO-2: losses differ by up to 0.1" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("arguments", [["--only", "ddp"], ["--epochs", "1"]])
def test_the_command_writes_no_part_of_a_table(trained: dict[str, Curve], page: Path, arguments: list[str]) -> None:
    before = page.read_text(encoding="utf-8")
    assert losses.main(["--page", str(page), *arguments]) == 0
    assert page.read_text(encoding="utf-8") == before


def test_a_check_that_fails_says_so_by_its_exit_code(
    trained: dict[str, Curve], page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert losses.main(["--page", str(page), "--check"]) == 1
    assert "run this without --check" in capsys.readouterr().err


def test_a_check_of_other_epochs_is_refused(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        losses.main(["--check", "--epochs", "1", "--page", str(page)])
    assert "leave --epochs 1 out" in capsys.readouterr().err


def test_without_deepspeed_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(losses, "_has_deepspeed", lambda: False)
    assert losses.main(["--only", "zero1"]) == 2
    assert "hatch run deepspeed:table" in capsys.readouterr().err


def test_the_page_of_the_docs_has_all_rows() -> None:
    rows = losses.PAGE.read_text(encoding="utf-8").partition(losses.MARKS[0])[2].partition(losses.MARKS[1])[0]
    for run in losses.RUNS.values():
        assert f"| {run.title} | {run.num_processes} |" in rows
