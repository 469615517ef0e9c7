from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_launch.watch import FINAL_RELEASE_AFTER_S, RELEASE_AFTER_S, StderrWatch

TRACEBACK = b'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\nValueError: no\n'

LOGGED = b'Traceback (most recent call last):\n  File "a.py", line 4, in load\nValueError: no\n'


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[left:right] for left, right in itertools.pairwise(edges)]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_what_is_no_traceback_is_shown_whole_and_in_order(data: bytes, places: list[int]) -> None:
    watch = StderrWatch()
    shown = b"".join(watch.feed(part, 0.0) for part in cut(data, places))
    assert shown + watch.flush() + watch.release() == data


@given(st.lists(st.integers(0, len(TRACEBACK) + 6), max_size=6))
def test_a_traceback_is_held_wherever_it_is_cut(places: list[int]) -> None:
    watch = StderrWatch()
    shown = b"".join(watch.feed(part, 3.0) for part in cut(b"start\n" + TRACEBACK, places))
    assert shown == b"start\n"
    assert watch.held_since == 3.0
    assert watch.release() == TRACEBACK
    assert watch.held_since is None


def test_progress_bars_pass_by_their_carriage_returns_and_by_time() -> None:
    watch = StderrWatch()
    assert watch.feed(b"\r 10%", 0.0) == b"\r"
    assert watch.next_poll == pytest.approx(0.05)
    assert watch.poll(0.01) == b""
    assert watch.poll(0.06) == b" 10%"
    assert watch.next_poll is None
    assert watch.feed(b"\r 20%\r 30%", 1.0) == b"\r 20%\r"


def test_a_traceback_behind_a_progress_bar_is_held() -> None:
    watch = StderrWatch()
    assert watch.feed(b"\r 50%|##   | 5/10" + TRACEBACK, 0.0) == b"\r 50%|##   | 5/10"
    assert watch.release() == TRACEBACK


def test_a_traceback_that_nobody_caught_waits_longer_for_the_end() -> None:
    watch = StderrWatch()
    watch.feed(TRACEBACK, 5.0)
    assert watch.looks_final
    assert watch.poll(5.0 + RELEASE_AFTER_S) == b""
    assert watch.next_poll == 5.0 + FINAL_RELEASE_AFTER_S
    assert watch.poll(5.0 + FINAL_RELEASE_AFTER_S) == TRACEBACK
    for whole in (
        b'[rank0]: Traceback (most recent call last):\n[rank0]:   File "a.py", line 1, in <module>\n',
        b'Traceback (most recent call last):\n  File "<frozen runpy>", line 198, in _run_module_as_main\n',
        b'  + Exception Group Traceback (most recent call last):\n  |   File "a.py", line 1, in <module>\n',
        LOGGED + b"\nDuring handling of the above exception, another exception occurred:\n\n" + TRACEBACK,
    ):
        watch.feed(whole, 9.0)
        assert watch.looks_final
        watch.release()


def test_a_living_process_may_log_tracebacks() -> None:
    watch = StderrWatch()
    assert watch.feed(b"ERROR\n" + LOGGED + b"going on\n", 5.0) == b"ERROR\n"
    assert not watch.looks_final
    assert watch.next_poll == 5.0 + RELEASE_AFTER_S
    assert watch.poll(5.5) == b""
    assert watch.poll(5.0 + RELEASE_AFTER_S) == LOGGED + b"going on\n"
    assert watch.feed(b"more\n", 9.0) == b"more\n"


@pytest.mark.parametrize(
    "words",
    [
        b"[rank1]: Traceback (most recent call last):\n",
        b"  + Exception Group Traceback (most recent call last):\n",
        b'  File "a.py", line 3\n',
        b"Fatal Python error: Segmentation fault\n",
        b"usage: a.py [-h]\n",
        b"/usr/bin/python3.11: No module named nothing\n",
    ],
)
def test_last_words(words: bytes) -> None:
    watch = StderrWatch()
    assert watch.feed(words, 0.0) == b""
    assert watch.release() == words


def test_last_words_without_an_end_of_line() -> None:
    watch = StderrWatch()
    assert watch.feed(b"Traceback (most recent call last):", 2.0) == b""
    assert watch.flush() == b""
    assert watch.held_since == 2.0


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(b"ValueError: no", False), (b"RuntimeError: Connection reset by peer", True), (b"DistBackendError: NCCL", True)],
)
def test_a_lost_peer_is_recognised(reason: bytes, expected: bool) -> None:
    watch = StderrWatch()
    watch.feed(TRACEBACK + reason, 0.0)
    assert watch.looks_cascaded is expected
