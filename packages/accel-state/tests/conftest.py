"""Every test of this package fails if it leaves anything behind."""

from __future__ import annotations

import pytest

from accel_state.testing import leak_guard

guard = pytest.fixture(autouse=True)(leak_guard)
