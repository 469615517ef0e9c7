"""Metrics as lines of JSON in a folder: nothing to install, readable by everything, safe against crashes.

``<directory>/<run>/metrics.jsonl`` holds one object a line, ``{"step": 3, "time": 1700000000.5, "loss": 0.25}``: the
step (or null), the wall clock in seconds since 1970, and the values; `accel_track.json_form` lists how each is written.
``<directory>/<run>/config.json`` holds the hyperparameters; if a later start of the run has others, the earlier file is
kept as ``config.1.json`` and so on.

A run that is started again appends. Steps that it repeats after a crash are in the file twice; the later line holds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path, PurePath
from typing import Any

from accel_state.errors import AccelError, ConfigError
from accel_track.json_form import NOT_FINITE, config_form, metric_form

__all__ = ["JsonlTracker", "read_metrics"]

_BLOCK_BYTES = 65536


class JsonlTracker:
    """Writes a line of JSON for each `log`, at once: what was logged survives the death of the process.

    Args:
        directory: folder that holds a folder for each run. Created when needed.
    """

    requires_logging_directory: bool = True

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._run: str | None = None
        self._file: FileIO | None = None

    @property
    def name(self) -> str:
        """``"jsonl"``."""
        return "jsonl"

    @property
    def tracker(self) -> Path:
        """The file of metrics of the run that was started last.

        Raises:
            AccelError: before the first start.
        """
        if self._run is None:
            raise AccelError("The file of a JsonlTracker was asked for, but no run was started. Call `start` first.")
        return self.directory / self._run / "metrics.jsonl"

    def start(self, run: str, *, config: Mapping[str, Any]) -> None:
        """Store the hyperparameters, repair a line torn by a crash, and open the file for appending.

        Raises:
            ConfigError: if a run is open already, or `run` does not name a folder inside the directory.
        """
        if self._file is not None:
            raise ConfigError(
                f"The run {run!r} was to start, but this tracker is writing {self._run!r}. Call `finish` before."
            )
        _check_run(run)
        folder = self.directory / run
        folder.mkdir(parents=True, exist_ok=True)
        _store_config(folder, config_form(config))
        _repair(folder / "metrics.jsonl")
        self._run = run
        self._file = FileIO(folder / "metrics.jsonl", "a")

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Append one line.

        Raises:
            AccelError: if no run is open.
            ConfigError: if a value is neither a scalar nor text, or takes the name of a column of ours.
        """
        if self._file is None:
            raise AccelError(
                f"`log` was called with {', '.join(map(repr, values))}, but no run is open: `start` was not called, or "
                f"`finish` was. Begin a run before the first value."
            )
        row = {"step": metric_form("step", step), "time": round(time.time(), 6)}
        for key, value in values.items():
            _add(row, str(key), metric_form(str(key), value))
        self._file.write(_dump(row) + b"\n")

    def finish(self) -> None:
        """Make sure that everything is on the disk, and close the file. Does nothing where no run is open."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file of metrics as written, in order, with NaN and infinities as floats again.

    Raises:
        ConfigError: if a line is not JSON, such as the last one while a writer was killed in it.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"Line {number} of {path} is not JSON ({error}). It was torn or edited: start the run again, which "
                f"repairs a torn last line, or remove the line."
            ) from None
        rows.append(
            {key: NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
        )
    return rows


def _add(row: dict[str, Any], key: str, value: Any) -> None:
    """Put a metric into the line. A metric ``step`` may say again what the step is, as many scripts do."""
    if key == "step" and row["step"] in (None, value):
        row["step"] = value
    elif key in row:
        raise ConfigError(
            f"The metric `{key}={value!r}` takes the name of a column that holds {row[key]!r} in every line: "
            f"`step` and `time` are the step and the wall clock. Log it under another name, such as `my_{key}`."
        )
    else:
        row[key] = value


def _check_run(run: str) -> None:
    path = PurePath(run)
    if not run.strip() or path.is_absolute() or ".." in path.parts or path == PurePath() or "\0" in run:
        raise ConfigError(
            f"`run={run!r}` cannot name a folder inside the project's: it is empty, or leads out of it. "
            f"Give a name such as 'digits' or 'digits/seed-1'."
        )


def _dump(value: Any) -> bytes:
    # A lone surrogate becomes the escape by which JSON itself writes it.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="backslashreplace")


def _store_config(folder: Path, config: Any) -> None:
    path = folder / "config.json"
    text = json.dumps(config, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    data = text.encode("utf-8", errors="backslashreplace")
    if path.exists():
        if path.read_bytes() == data:
            return
        number = 1
        while (folder / f"config.{number}.json").exists():
            number += 1
        path.rename(folder / f"config.{number}.json")
    temporary = folder / "config.json.tmp"
    temporary.write_bytes(data)
    temporary.replace(path)


def _repair(path: Path) -> None:
    """Drop an incomplete last line, which a crash left without its newline. Reads the end of the file only."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        position = file.seek(0, os.SEEK_END)
        tail = b""
        while position > 0 and b"\n" not in tail:
            size = min(_BLOCK_BYTES, position)
            position = file.seek(position - size)
            tail = file.read(size) + tail
        torn = tail[tail.rfind(b"\n") + 1 :]
        if torn:
            file.seek(-len(torn), os.SEEK_END)
            file.truncate()
