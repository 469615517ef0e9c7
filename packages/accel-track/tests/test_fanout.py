"""One run and several trackers: errors of one cost nothing of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from accel_state.errors import AccelError, ConfigError
from accel_state.protocols import Tracker
from accel_track import Fanout, GeneralTracker


class Recorder:
    def __init__(self, name: str, *, fails: str = "", error: type[BaseException] = ValueError) -> None:
        self.name, self.fails, self.error = name, fails, error
        self.calls: list[Any] = []

    def _call(self, what: str, *details: Any) -> None:
        if what == self.fails:
            raise self.error(f"{self.name} broke")
        self.calls.append((what, *details))

    def start(self, run: str, *, config: Mapping[str, Any]) -> None:
        self._call("start", run, dict(config))

    def log(self, values: Mapping[str, Any], *, step: int | None) -> None:
        self._call("log", dict(values), step)

    def finish(self) -> None:
        self._call("finish")


def test_everything_reaches_everybody_in_order() -> None:
    trackers = [Recorder("a"), Recorder("b")]
    fanout = Fanout(trackers)
    assert isinstance(fanout, Tracker)
    assert fanout.name == "a+b"
    fanout.start("run", config={"lr": 1})
    assert fanout.started
    fanout.log({"loss": 0.5}, step=1)
    fanout.log({"loss": 0.4})
    fanout.finish()
    fanout.finish()
    assert not fanout.started
    for each in trackers:
        assert each.calls == [
            ("start", "run", {"lr": 1}),
            ("log", {"loss": 0.5}, 1),
            ("log", {"loss": 0.4}, None),
            ("finish",),
        ]


def test_a_fanout_of_nothing_works() -> None:
    fanout = Fanout([])
    fanout.start("run", config={})
    fanout.log({"loss": 1}, step=0)
    fanout.finish()


def test_a_failing_log_loses_nothing_of_the_others() -> None:
    first, bad, worse, last = (
        Recorder("first"),
        Recorder("bad", fails="log"),
        Recorder("worse", fails="log"),
        Recorder("z"),
    )
    fanout = Fanout([first, bad, worse, last])
    fanout.start("run", config={})
    with pytest.raises(
        AccelError,
        match=r"`log` failed in 2 tracker\(s\): 'bad' \(ValueError: bad broke\); 'worse' .*have kept.*`log_with`",
    ) as caught:
        fanout.log({"loss": 1}, step=0)
    assert str(caught.value.__cause__) == "bad broke"
    assert first.calls[-1] == last.calls[-1] == ("log", {"loss": 1}, 0)
    fanout.finish()
    assert bad.calls[-1] == ("finish",)


def test_a_failing_finish_finishes_the_others() -> None:
    bad, good = Recorder("bad", fails="finish"), Recorder("good")
    fanout = Fanout([bad, good])
    fanout.start("run", config={})
    with pytest.raises(AccelError, match=r"`finish` failed in 1 tracker\(s\): 'bad'.*The others are complete"):
        fanout.finish()
    assert good.calls[-1] == ("finish",)
    fanout.finish()


def test_a_failing_start_finishes_those_that_began() -> None:
    good, bad, after = Recorder("good"), Recorder("bad", fails="start"), Recorder("after")
    fanout = Fanout([good, bad, after])
    with pytest.raises(AccelError, match=r"`start` failed in 1 tracker\(s\): 'bad'.*No run was begun"):
        fanout.start("run", config={})
    assert [good.calls[-1], after.calls[-1]] == [("finish",)] * 2
    assert bad.calls == []
    assert not fanout.started


def test_an_interrupt_is_not_held_back() -> None:
    bad, good = Recorder("bad", fails="log", error=KeyboardInterrupt), Recorder("good")
    fanout = Fanout([bad, good])
    fanout.start("run", config={})
    with pytest.raises(KeyboardInterrupt, match="bad broke"):
        fanout.log({"loss": 1}, step=0)
    assert [call[0] for call in good.calls] == ["start"]


def test_a_second_start_is_refused_and_names_what_differs() -> None:
    recorder = Recorder("a")
    fanout = Fanout([recorder])
    fanout.start("run", config={"lr": 0.1, "seed": 1})
    with pytest.raises(
        ConfigError, match=r"run 'run' was to start, with the same configuration, but the run 'run' is open"
    ):
        fanout.start("run", config={"lr": 0.1, "seed": 1})
    with pytest.raises(
        ConfigError,
        match=r"'two' was to start, differing in `lr` \(0\.1, now 0\.2\), `seed` \(1, now '\(none\)'\).*`finish`",
    ):
        fanout.start("two", config={"lr": 0.2})
    assert len(recorder.calls) == 1
    fanout.finish()
    fanout.start("two", config={})
    assert recorder.calls[-1] == ("start", "two", {})


def test_logging_outside_a_run_is_refused() -> None:
    fanout = Fanout([Recorder("a")])
    with pytest.raises(AccelError, match=r"`log` was called with 'loss', but no run is open.*`init_trackers`"):
        fanout.log({"loss": 1}, step=0)


def test_two_trackers_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 trackers are called 'a'.*another `name`"):
        Fanout([Recorder("a"), Recorder("b"), Recorder("a")])


def test_a_tracker_is_found_by_name() -> None:
    recorder = Recorder("wandb")
    fanout = Fanout([recorder])
    assert fanout.get("wandb") is recorder
    with pytest.raises(ConfigError, match=r"called 'wanbd'\. Did you mean 'wandb'\? There are wandb"):
        fanout.get("wanbd")
    with pytest.raises(ConfigError, match="There are none"):
        Fanout([]).get("wandb")


class Mine(GeneralTracker):
    name = "mine"

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.kept.append(values)

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        self.kept.append((dict(values), step))


def test_a_users_tracker_needs_only_three_things() -> None:
    mine = Mine()
    assert isinstance(mine, Tracker)
    assert mine.tracker is mine
    assert not mine.requires_logging_directory
    fanout = Fanout([mine])
    fanout.start("run", config={"lr": 1})
    fanout.log({"loss": 2}, step=3)
    fanout.finish()
    assert mine.kept == [{"lr": 1}, ({"loss": 2}, 3)]


def test_a_users_tracker_that_lacks_something_cannot_be_made() -> None:
    class Incomplete(GeneralTracker):
        name = "incomplete"

    with pytest.raises(TypeError, match=r"Incomplete.*log.*store_init_configuration"):
        Incomplete()  # type: ignore[abstract]
