"""One run, several trackers: each gets everything, whatever happens to the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from accel_state.config import did_you_mean
from accel_state.errors import AccelError, ConfigError
from accel_state.protocols import Tracker

__all__ = ["Fanout"]


class Fanout:
    """Starts, feeds and finishes several trackers as one. Itself a tracker.

    An error in one tracker is raised only after all others had their turn, so that it costs none of their data.

    Args:
        trackers: in the order in which they are called; with different names. May be empty.

    Raises:
        ConfigError: if two of them have one name.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.trackers = tuple(trackers)
        names = [each.name for each in self.trackers]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"{names.count(name)} trackers are called {name!r}, and each name stands for one. "
                    f"Leave one out, or give your own tracker another `name`."
                )
        self._run: tuple[str, dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """The names of all, joined by ``+``."""
        return "+".join(each.name for each in self.trackers)

    @property
    def started(self) -> bool:
        """Whether a run is open."""
        return self._run is not None

    def get(self, name: str) -> Tracker:
        """The tracker called `name`.

        Raises:
            ConfigError: if there is none.
        """
        names = [each.name for each in self.trackers]
        if name not in names:
            raise ConfigError(
                f"No tracker of this run is called {name!r}.{did_you_mean(name, names)} "
                f"There are {', '.join(names) or 'none'}; choose them with `log_with`."
            )
        return self.trackers[names.index(name)]

    def start(self, run: str, *, config: Mapping[str, Any]) -> None:
        """Begin a run on every tracker. If one cannot start, those that did are finished again.

        Raises:
            ConfigError: if a run is open already.
            AccelError: if a tracker failed.
        """
        if self._run is not None:
            raise ConfigError(_second_start(self._run, run, config))
        failures = _Failures("start")
        for each in self.trackers:
            with failures.of(each):
                each.start(run, config=config)
        if failures.errors:
            for each in self.trackers:
                if each.name not in failures.errors:
                    with failures.of(each):
                        each.finish()
            failures.raise_first("No run was begun.")
        self._run = (run, dict(config))

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Hand `values` to every tracker.

        Raises:
            AccelError: if no run is open, or if a tracker failed.
        """
        if self._run is None:
            raise AccelError(
                f"`log` was called with {', '.join(map(repr, values))}, but no run is open: `start` was not called, or "
                f"`finish` was. Begin a run before the first value, with `init_trackers`."
            )
        failures = _Failures("log")
        for each in self.trackers:
            with failures.of(each):
                each.log(values, step=step)
        failures.raise_first("The others have kept the values.")

    def finish(self) -> None:
        """End the run on every tracker. Does nothing where no run is open; afterwards a new one may begin.

        Raises:
            AccelError: if a tracker failed.
        """
        if self._run is None:
            return
        self._run = None
        failures = _Failures("finish")
        for each in self.trackers:
            with failures.of(each):
                each.finish()
        failures.raise_first("The others are complete.")


class _Failures:
    """Collects what trackers raise, to raise it once all had their turn. Lets ``KeyboardInterrupt`` and such pass."""

    def __init__(self, action: str) -> None:
        self.action = action
        self.errors: dict[str, Exception] = {}
        self._current = ""

    def of(self, tracker: Tracker) -> _Failures:
        self._current = tracker.name
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self.errors.setdefault(self._current, error)
            return True
        return False

    def raise_first(self, outcome: str) -> None:
        """Raise an error that names every tracker that failed, caused by the first one's."""
        if self.errors:
            failed = "; ".join(f"{name!r} ({type(each).__name__}: {each})" for name, each in self.errors.items())
            raise AccelError(
                f"`{self.action}` failed in {len(self.errors)} tracker(s): {failed}. {outcome} "
                f"Correct what it says, or leave the tracker out of `log_with`."
            ) from next(iter(self.errors.values()))


def _second_start(open_run: tuple[str, dict[str, Any]], run: str, config: Mapping[str, Any]) -> str:
    name, earlier = open_run
    keys = sorted({*earlier, *config}, key=str)
    differing = [key for key in keys if repr(earlier.get(key, "(none)")) != repr(config.get(key, "(none)"))]
    changes = ", ".join(
        f"`{key}` ({earlier.get(key, '(none)')!r}, now {config.get(key, '(none)')!r})" for key in differing
    )
    what = f"differing in {changes}" if differing else "with the same configuration"
    return (
        f"The run {run!r} was to start, {what}, but the run {name!r} is open, and a second start would split or repeat "
        f"its metrics. Start trackers once a run, or call `finish` (`end_training`) first."
    )
