"""Running statistics of sharded models, which each rank keeps of its own batches: rank 0's count, as under DDP."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["share_statistics"]


def share_statistics(model: nn.Module) -> None:
    """Let forwards that use running statistics, as evaluations do, begin with those of rank 0 on every rank.

    Otherwise each rank would evaluate another model, and a checkpoint would hold what only one of them has seen.
    `SyncBatchNorm`, whose statistics are of all ranks, has nothing to take over.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]
    norms = [module for module in norms if not isinstance(module, nn.SyncBatchNorm)]
    if norms and dist.get_world_size() > 1:
        shared = _Shared(norms)
        model.register_forward_pre_hook(shared.before)


class _Shared:
    def __init__(self, norms: list[_NormBase]) -> None:
        self._norms = norms
        self._parted = False
        """Whether forwards may have changed them, each rank's by its own batch."""

    def before(self, model: nn.Module, args: Any) -> None:
        """Every rank calls this, before each forward."""
        if self._parted and not all(norm.training for norm in self._norms):
            for norm in self._norms:
                for value in (norm.running_mean, norm.running_var):
                    assert value is not None
                    # Past autograd, which may hold them for a backward that does not read them.
                    dist.broadcast(value.data, src=0)
            self._parted = False
        self._parted = self._parted or any(norm.training for norm in self._norms)
