"""A plugin of pytest that ends a run of tests that hangs and shows where, whatever it hangs in.

Load it by ``-p accel_state.testing.hangs``; it goes with pytest-timeout.

pytest-timeout raises in the main thread, which never gets to it while it waits in native code, or while another thread
keeps the interpreter's lock. A moment later than that, and whenever the interpreter does not end after the last test,
``faulthandler`` writes the stacks of all threads from a thread of its own, which needs no lock, and ends the process.

Where pytest-timeout does reach, what hung may hold a lock that every following test waits for in turn: a few such
timeouts end the run, with the summary of what failed.

A fork that this process makes meanwhile has to end by ``os._exit``, as those of ``multiprocessing`` do: on its way out
the interpreter would wait for that thread, which is not in the fork (true up to Python 3.13 at least).
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from typing import Any

import pytest

GRACE_S = 30.0
"""How much longer than its timeout a test may take, all its fixtures included."""
EXIT_S = 60.0
"""How long the interpreter may take to end, which waits for every thread that is no daemon."""
MAX_TIMEOUTS = 3
"""After so many tests that pytest-timeout has ended no other is begun."""

_limit_s = pytest.StashKey[float]()
_stderr = pytest.StashKey[int]()
_num_timeouts = pytest.StashKey[int]()


def _watch(config: pytest.Config, limit_s: float) -> None:
    faulthandler.dump_traceback_later(limit_s, exit=True, file=config.stash[_stderr])


def pytest_configure(config: pytest.Config) -> None:
    """Keep the error output: tests are run with another in its place."""
    config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """Of pytest-timeout, where a test has a timeout; it sets its own timer after this."""
    item.stash[_limit_s] = settings.timeout + GRACE_S
    _watch(item.config, item.stash[_limit_s])


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any]) -> None:
    """A test has failed: pytest and pytest-timeout call their timers off, and fixtures are still to be torn down."""
    if _limit_s in node.stash:
        _watch(node.config, node.stash[_limit_s])
    if call.excinfo is not None and "from pytest-timeout" in str(call.excinfo.value):
        number = node.config.stash[_num_timeouts] = node.config.stash.get(_num_timeouts, 0) + 1
        if number == MAX_TIMEOUTS:
            node.session.shouldfail = f"{number} tests hung, the last one was {node.nodeid}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """The whole of a test."""
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Nothing calls this one off but the end of the interpreter."""
    _watch(config, EXIT_S)
