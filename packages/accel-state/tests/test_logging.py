"""Who logs, in which order, and which line the record names."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from accel_state import ConfigError, Process, get_logger, tqdm
from accel_state.testing import run_ranks


def test_before_a_process_is_open_it_logs(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("accel.test", log_level="info")
    logger.info("value %d", 3)
    logger.debug("not this")
    logger.info("in order", in_order=True)
    assert [record.getMessage() for record in caplog.records] == ["value 3", "in order"]
    assert {record.filename for record in caplog.records} == {Path(__file__).name}
    assert caplog.records[0].funcName == "test_before_a_process_is_open_it_logs"


def test_exceptions_and_extras_pass(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("accel.test", log_level=logging.INFO)
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("outer", extra={"step": 3})
    assert caplog.records[0].exc_info is not None
    logger.log(logging.WARNING, "direct")
    assert caplog.records[1].funcName == "test_exceptions_and_extras_pass"


def test_unknown_level() -> None:
    with pytest.raises(ConfigError, match="`log_level='loud'` is no level"):
        get_logger("accel.test", log_level="loud")


def test_order_of_one_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves one process, which has no order"):
        get_logger("accel.test").info("x", main_process_only=True, in_order=True)


def log_to(path: str) -> None:
    logger = get_logger("accel.test", log_level="INFO")
    handler = logging.FileHandler(path)
    logger.logger.addHandler(handler)
    rank = Process.current().topology.rank
    logger.info("main %d", rank)
    Process.current().barrier()
    logger.info("turn %d", rank, in_order=True)
    # Ranks with other levels meet at the same turns.
    logger.debug("silent", in_order=True)
    logger.info("all", main_process_only=False)
    handler.close()


def test_main_logs_alone_and_others_in_turn(tmp_path: Path) -> None:
    run_ranks(log_to, 3, str(tmp_path / "log"))
    assert (tmp_path / "log").read_text().split("\n")[:-1] == ["main 0", "turn 0", "turn 1", "turn 2", *["all"] * 3]


def bars() -> tuple[str, str, list[int]]:
    shown, forced = io.StringIO(), io.StringIO()
    values = list(tqdm(range(3), file=shown))
    list(tqdm(range(3), file=forced, main_process_only=False))
    return shown.getvalue(), forced.getvalue(), values


def test_one_bar_a_node() -> None:
    answers = run_ranks(bars, 4, nodes=2)
    assert [bool(shown) for shown, _, _ in answers] == [True, False, True, False]
    assert all(forced for _, forced, _ in answers)
    assert all(values == [0, 1, 2] for _, _, values in answers)
    hidden = io.StringIO()
    assert list(tqdm(range(2), file=hidden, disable=True)) == [0, 1]
    assert not hidden.getvalue()
