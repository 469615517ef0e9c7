"""Every test of this package fails if it leaves anything behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accel_state.process import Process
from accel_state.testing import leak_guard

guard = pytest.fixture(autouse=True)(leak_guard)


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one on one thread: what an `Accelerator` opens here is closed after the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if Process.is_open():
        Process.current().close()
