"""Host memory that a device copies from at the speed of the bus, up to a budget."""

from __future__ import annotations

import torch

from accel_bigmodel.stream.device import Transfers
from accel_bigmodel.stream.layout import Layout
from accel_bigmodel.stream.source import HostSource
from accel_state.errors import ConfigError
from accel_state.logging import get_logger

__all__ = ["HostMemory"]

logger = get_logger(__name__)


class HostMemory:
    """Gives memory for units that stay on the host, pinned as far as the budget goes.

    Pinning takes long and cannot be paged out, so each unit is pinned once, when it is made. What the budget leaves out
    lies in ordinary memory and is copied through `Staging`, at about the speed at which a core copies.

    Args:
        transfers: the device.
        budget_bytes: how much may be pinned; None for as much as there is.
    """

    def __init__(self, transfers: Transfers, *, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and budget_bytes < 0:
            raise ConfigError(
                f"`pinned_memory={budget_bytes}` is no amount of memory. Give bytes, 0 to pin nothing, or None to pin "
                f"all."
            )
        self._transfers = transfers
        self._left = budget_bytes

    def source(self, layout: Layout) -> HostSource:
        """Memory for one unit, its values still to be written."""
        size = layout.num_bytes
        if self._left is None or size <= self._left:
            flat = self._pinned(size)
            if flat is not None:
                self._left = None if self._left is None else self._left - size
                return HostSource(layout, flat, is_pinned=True)
        return HostSource(layout, torch.empty(size, dtype=torch.uint8, device="cpu"), is_pinned=False)

    def _pinned(self, size: int) -> torch.Tensor | None:
        try:
            return self._transfers.host_bytes(size)
        except RuntimeError as error:
            logger.warning(
                "No more than what is pinned already can be pinned (%s). The rest is copied through pinned buffers, "
                "which is slower.",
                str(error).splitlines()[0],
            )
            self._left = 0
            return None
