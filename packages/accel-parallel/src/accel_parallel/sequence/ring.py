"""torch's own ring attention, where the device has its kernels. Experimental, and reached through one function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from accel_state.errors import ConfigError

if TYPE_CHECKING:
    from accel_parallel.parallelism import TorchContextParallelConfig

__all__ = ["TorchRing"]


class TorchRing:
    """Opens blocks in which torch cuts buffers and passes keys and values round the ring."""

    def __init__(
        self, group: dist.ProcessGroup, *, device_type: str, options: TorchContextParallelConfig | None = None
    ) -> None:
        """
        Args:
            group: whose ranks share the sequence.
            device_type: of the tensors, such as ``"cuda"``.
            options: how keys and values travel; torch keeps that in one place for the whole process.

        Raises:
            ConfigError: for a device without the kernels, and a torch without that function.
        """
        if device_type != "cuda":
            raise ConfigError(
                f"`cp_backend='torch'` was set on {device_type}: ring attention puts together what flash and "
                f"memory-efficient kernels return, and those do not exist there. Leave `cp_backend` at 'native', which "
                f"runs on any device."
            )
        try:
            from torch.distributed.device_mesh import DeviceMesh
            from torch.distributed.tensor.experimental import context_parallel
            from torch.distributed.tensor.experimental._attention import set_rotate_method
        except ImportError as error:
            raise ConfigError(
                f"`cp_backend='torch'` was set, and torch {torch.__version__} has its `context_parallel` "
                f"elsewhere ({error}). Leave `cp_backend` at 'native', or use another torch."
            ) from error
        self._open = context_parallel
        self._mesh = DeviceMesh.from_group(group, device_type)
        if options is not None:
            set_rotate_method(options.cp_comm_strategy)

    def open(
        self, buffers: Sequence[torch.Tensor], buffer_seq_dims: Sequence[int], no_restore_buffers: set[torch.Tensor]
    ) -> AbstractContextManager[None]:
        """Every rank must enter, around forward and backward."""
        return self._open(
            self._mesh,
            buffers=list(buffers),
            buffer_seq_dims=list(buffer_seq_dims),
            no_restore_buffers=no_restore_buffers,
        )
