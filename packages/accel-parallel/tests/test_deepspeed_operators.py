"""What is said of the compilation that every run on a CPU waits for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from accel_parallel.deepspeed import operators


def test_a_lock_that_another_process_holds_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock").touch()
    monkeypatch.setattr(operators, "told_to_others", lambda _: str(tmp_path))
    with caplog.at_level(logging.WARNING):
        operators.tell_of_locks()
    assert caplog.text.count("is being compiled since") == 1
    assert str(lock) in caplog.text


def test_a_lock_that_goes_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(operators.os, "walk", lambda _: [(str(tmp_path / "deepspeed_shm_comm"), [], ["lock"])])
    operators.tell_of_locks()
    assert "compiled since" not in caplog.text
