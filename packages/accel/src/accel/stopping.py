"""Signals that ask a run to end, noticed by all of its processes at the same place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["StopSignals"]


class StopSignals:
    """Handlers of signals, from when it is made until `release`."""

    def __init__(self, signals: Sequence[int], *, replacing: StopSignals | None = None) -> None:
        """
        Args:
            signals: numbers; by default ``SIGTERM`` and ``SIGUSR1``.
            replacing: one whose handlers go.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "Signals can only be caught by the main thread, and this is another. Call `catch_stop_signals()` there."
            )
        if replacing is not None:
            replacing.release()
        self._caught: bool = replacing is not None and replacing._caught
        self._before: dict[int, Any] = {}
        try:
            for number in signals or (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._catch)
        except (OSError, ValueError) as error:
            self.release()
            raise ConfigError(
                f"One of the signals {list(signals)} cannot be caught ({error}). Give those that ask a process to end, "
                f"such as `signal.SIGTERM`."
            ) from error

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = True
        signal.signal(number, self._before[number])  # whoever sends it again means it

    def any_caught(self, process: Process) -> bool:
        """Whether any process has caught one. Every rank must call this."""
        if process.topology.world_size == 1:
            return self._caught
        flag = torch.tensor(int(self._caught), device=process.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def release(self) -> None:
        """Let signals do what they did before."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._catch:
                signal.signal(number, handler)
        self._before.clear()
