"""Every test of this package fails if it leaves anything behind."""

from __future__ import annotations

import pytest
import torch

from accel_state.testing import leak_guard

guard = pytest.fixture(autouse=True)(leak_guard)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
