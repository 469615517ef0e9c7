"""What the engine asks of a device: memory, copies behind its back, and marks by which one stream waits for another.

Two streams matter: the one that computes, which is whatever the caller has made current, and one of our own that
copies. Waiting is done by the device and not by the host, with the one exception of `Transfers.host_after`.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["AcceleratorTransfers", "Mark", "Transfers"]


class Mark(Protocol):
    """A point in the work of a stream."""


class Transfers(Protocol):
    """Copies to and from one device. `AcceleratorTransfers` is the real one; tests have one that looks for races."""

    device: torch.device

    def device_bytes(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised memory of the device, uint8, flat; whoever computed with it before may not be done yet."""

    def host_bytes(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised memory of the host, uint8, flat, that the device reads and writes by itself (pinned).

        Raises:
            RuntimeError: if there is no more of it.
        """

    def stream(self) -> Hashable:
        """Which stream is the computing one now."""

    def share(self, memory: torch.Tensor) -> None:
        """The computing stream uses `memory` too, which was taken when another one was: it is not used again before."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Begin a copy, on the copying stream, between memory of the device and memory of the host, either way."""

    def copied(self) -> Mark:
        """A mark behind everything that the copying stream was given."""

    def computed(self) -> Mark:
        """A mark behind everything that the computing stream was given."""

    def copy_after(self, mark: Mark) -> None:
        """What the copying stream is given from now on waits for `mark`."""

    def compute_after(self, mark: Mark) -> None:
        """What the computing stream is given from now on waits for `mark`."""

    def host_after(self, mark: Mark) -> None:
        """The host waits for `mark`."""


class _EventMark:
    def __init__(self, event: Any) -> None:
        self.event = event


class AcceleratorTransfers:
    """By the streams and events of ``torch.<type>``, as CUDA, XPU and others have them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = getattr(torch, device.type)
        self._copying: Any = self._module.Stream(device=device)

    def device_bytes(self, num_bytes: int) -> torch.Tensor:
        """See `Transfers`. Allocated for the computing stream; `Engine` orders the copying one behind it."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def host_bytes(self, num_bytes: int) -> torch.Tensor:
        """See `Transfers`.

        The allocator of pinned memory rounds up to a power of two, which may double what a model takes. CUDA can pin
        memory that is there already.
        """
        if self.device.type != "cuda" or num_bytes == 0:
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        memory = np.empty(num_bytes, dtype=np.uint8)
        address = memory.ctypes.data
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(cudart.cudaHostRegister(address, num_bytes, 0)) != 0:
            raise RuntimeError(f"cudaHostRegister refused {num_bytes} bytes")
        weakref.finalize(memory, cudart.cudaHostUnregister, address)
        return torch.from_numpy(memory)

    def stream(self) -> Hashable:
        """See `Transfers`."""
        current: Hashable = self._module.current_stream(self.device)
        return current

    def share(self, memory: torch.Tensor) -> None:
        """See `Transfers`."""
        memory.record_stream(self._module.current_stream(self.device))

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfers`."""
        with self._module.stream(self._copying):
            destination.copy_(source, non_blocking=True)

    def copied(self) -> Mark:
        """See `Transfers`."""
        return self._mark(self._copying)

    def computed(self) -> Mark:
        """See `Transfers`."""
        return self._mark(self._module.current_stream(self.device))

    def copy_after(self, mark: Mark) -> None:
        """See `Transfers`."""
        self._copying.wait_event(_event(mark))

    def compute_after(self, mark: Mark) -> None:
        """See `Transfers`."""
        self._module.current_stream(self.device).wait_event(_event(mark))

    def host_after(self, mark: Mark) -> None:
        """See `Transfers`."""
        _event(mark).synchronize()

    def _mark(self, stream: Any) -> Mark:
        return _EventMark(stream.record_event())


def _event(mark: Mark) -> Any:
    assert isinstance(mark, _EventMark), "a mark of another device"
    return mark.event
