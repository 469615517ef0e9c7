"""Where metrics go: trackers, a fan-out to several of them, and lines of JSON. Imports no torch."""

from __future__ import annotations

from accel_track._version import __version__
from accel_track.fanout import Fanout
from accel_track.json_form import config_form
from accel_track.jsonl import JsonlTracker, read_metrics
from accel_track.registry import TRACKER_GROUP, LogWith, make_trackers, tracker_names
from accel_track.tracker import GeneralTracker

__all__ = [
    "__version__",
    "Fanout",
    "GeneralTracker",
    "JsonlTracker",
    "LogWith",
    "TRACKER_GROUP",
    "config_form",
    "make_trackers",
    "read_metrics",
    "tracker_names",
]
