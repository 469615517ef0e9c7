"""A device that is not there, for tests of what moves weights."""

from accel_bigmodel.testing.fake_device import FakeTransfers, RaceError

__all__ = ["FakeTransfers", "RaceError"]
