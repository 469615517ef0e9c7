"""For tests of what moves weights: a device that is not there, and files to read."""

from accel_bigmodel.testing.fake_device import FakeTransfers, RaceError
from accel_bigmodel.testing.files import load_file, save_file

__all__ = ["FakeTransfers", "RaceError", "load_file", "save_file"]
