"""How values get from host memory to a device: at once, or on a stream while the next ones are read."""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["BlockingLane", "Lane", "StreamLane", "lane_for", "pins"]


class Lane(Protocol):
    """One thread's way to one device."""

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Copy each second tensor, on the host, into the first; returns what `wait` takes.

        The host's memory must stay as it is until then.
        """

    def wait(self, mark: Any) -> None:
        """Return once that copy is over."""


class BlockingLane:
    """Copies are over when the call returns. For the CPU, and for devices without streams."""

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, values in pairs:
            target.copy_(values)

    def wait(self, mark: Any) -> None: ...


class StreamLane:
    """Copies run on a stream of their own, and dtypes are converted on the device.

    Args:
        device: where the targets are. They were allocated on its current stream, which is waited for first.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._stream = self._module.Stream(device=device)
        self._stream.wait_stream(self._module.current_stream(device))

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        event = self._module.Event()
        with self._module.stream(self._stream):
            for target, values in pairs:
                if target.dtype == values.dtype and target.is_contiguous() and values.is_contiguous():
                    target.copy_(values, non_blocking=True)
                else:  # torch would convert on the host, into pageable memory
                    raw = torch.empty(values.shape, dtype=values.dtype, device=self._device)
                    raw.copy_(values, non_blocking=True)
                    target.copy_(raw)
            event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()


def lane_for(device: torch.device) -> Lane:
    """A lane to `device` for the thread that calls this."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is not None and all(hasattr(module, name) for name in ("Stream", "Event", "stream", "current_stream")):
        return StreamLane(device)
    return BlockingLane()


def pins(device: torch.device) -> bool:
    """Whether copies from pinned memory to `device` need no other copy on the host."""
    return device.type in ("cuda", "xpu")
