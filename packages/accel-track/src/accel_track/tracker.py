"""The base class of users' own trackers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

__all__ = ["GeneralTracker"]


class GeneralTracker(ABC):
    """A tracker written by a user: give it a `name`, `store_init_configuration` and `log`.

    It fits `accel_state.protocols.Tracker`, and is only called on the main process. ``__init__`` is free for its own
    arguments and need not be called by subclasses.
    """

    requires_logging_directory: bool = False
    """Whether the class, when it is chosen by its name, is created with the folder to write into."""

    @property
    @abstractmethod
    def name(self) -> str:
        """By which users find it again. A plain class attribute does: ``name = "mine"``."""

    @property
    def tracker(self) -> Any:
        """What it writes to, such as a vendor's run object; itself unless overridden."""
        return self

    @abstractmethod
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the hyperparameters of the run. Called once, before anything is logged."""

    @abstractmethod
    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Keep these metrics of this step."""

    def start(self, run: str, *, config: Mapping[str, Any]) -> None:
        """Begin a run: hands the hyperparameters to `store_init_configuration`. Override it to use the run's name."""
        self.store_init_configuration(dict(config))

    def finish(self) -> None:  # noqa: B027 - a tracker that holds nothing back has nothing to do here
        """Write out whatever is held back. Called once, also when training failed."""
