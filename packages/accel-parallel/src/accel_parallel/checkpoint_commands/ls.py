"""`accel checkpoint ls`: the checkpoints of a run, and what unfinished saves left."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from accel_parallel.checkpoint_commands.arguments import Arguments
from accel_parallel.checkpoint_commands.places import Place, survey
from accel_parallel.checkpoint_commands.text import age_text, size_text, table

__all__ = ["main"]

_NOTES = """\
Reads the manifest of each checkpoint and none of its other files, so it is quick, and proves nothing: see `verify`.
A folder without a manifest is named as what it is: being written, left behind by a process that died, or incomplete.
`*` marks the one that `load_state()` takes.

examples
  accel checkpoint ls runs/7b                          a project folder
  accel checkpoint ls s3://bucket/7b                   an object store: complete numbered ones
  accel checkpoint ls runs/7b --json | jq '.[] | select(.is_latest) | .path'"""


def main(argv: Sequence[str]) -> int:
    """List them."""
    arguments = Arguments("ls", notes=_NOTES)
    arguments.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="by default the current one")
    arguments.add_argument("--json", action="store_true", help="a list of objects, for programs")
    options = arguments.read(argv)
    if options is None:
        return 0
    places = survey(options.folder)
    if options.json:
        print(json.dumps([_data(place) for place in places], indent=1))
        return 0
    if not places:
        print(f"No checkpoints under {options.folder}.")
        return 0
    for line in _lines(places):
        print(line)
    return 0


def _lines(places: Sequence[Place]) -> list[str]:
    now = time.time()
    heads = ("", "name", "step", "written", "size", "world", "strategy", "state")
    rows = [_row(place, now) for place in places]
    lines = table(heads, rows, right=("step", "size"))
    return lines + [f"{place.name}: {place.problem}" for place in places if place.problem]


def _row(place: Place, now: float) -> list[str]:
    manifest = place.manifest
    written = "" if place.written_s is None else age_text(now - place.written_s)
    mark = "*" if place.is_latest else ""
    if manifest is None:
        return [mark, place.name, "", written, "", "", "", place.state]
    mesh = " ".join(f"{axis}={size}" for axis, size in manifest.mesh.items())
    world = f"{manifest.world_size}{f' ({mesh})' if mesh else ''}"
    size = size_text(place.size_bytes or 0)
    return [mark, place.name, f"{manifest.step:,}", written, size, world, manifest.strategy, place.state]


def _data(place: Place) -> dict[str, Any]:
    manifest = place.manifest
    return {
        "path": str(place.location),
        "name": place.name,
        "state": place.state,
        "is_latest": place.is_latest,
        "number": place.number,
        "written": None if place.written_s is None else _time(place.written_s),
        "problem": place.problem or None,
        "step": None if manifest is None else manifest.step,
        "size_bytes": place.size_bytes,
        "world_size": None if manifest is None else manifest.world_size,
        "mesh": None if manifest is None else dict(manifest.mesh),
        "strategy": None if manifest is None else manifest.strategy,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
