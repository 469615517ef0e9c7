"""What users may set about a strategy."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Any

from accel_state.errors import ConfigError

__all__ = [
    "DDPCommunicationHookType",
    "DistributedDataParallelKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
]


class DDPCommunicationHookType(str, Enum):
    """How DDP exchanges a bucket of gradients."""

    NO = "no"
    """As they are."""
    FP16 = "fp16"
    """Rounded to float16 for the exchange: half the traffic, gradients no longer exact."""
    BF16 = "bf16"
    """Rounded to bfloat16 for the exchange: half the traffic, gradients no longer exact."""
    POWER_SGD = "power_sgd"
    """Low-rank approximation with error feedback (Vogels et al., arXiv:1905.13727)."""
    BATCHED_POWER_SGD = "batched_power_sgd"
    """The same over a whole flattened bucket: faster, coarser."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedDataParallelKwargs:
    """Options of ``torch.nn.parallel.DistributedDataParallel``. Ignored in a world of one."""

    broadcast_buffers: bool = True
    """Whether rank 0's buffers replace everybody's at the start of each forward."""
    bucket_cap_mb: int | None = None
    """Size of a bucket of gradients in MiB; ``None``: torch's own choice."""
    find_unused_parameters: bool = False
    """Whether to look, each forward, for parameters that will get no gradient. Costs a graph walk a step."""
    gradient_as_bucket_view: bool = False
    """Whether gradients live in the exchange buffers, saving a copy of them in memory."""
    static_graph: bool = False
    """Whether every step uses the same parameters in the same order; allows more overlap."""
    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    """How a bucket is exchanged."""
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    """``FP16`` or ``BF16``: what `comm_hook` itself sends is rounded to this dtype."""
    comm_state_option: dict[str, Any] = field(default_factory=dict)
    """Further arguments of PowerSGD's state, such as ``matrix_approximation_rank``."""

    def __post_init__(self) -> None:
        for name in ("comm_hook", "comm_wrapper"):
            object.__setattr__(self, name, _hook_type(name, getattr(self, name)))
        if self.bucket_cap_mb is not None and not self.bucket_cap_mb > 0:
            raise ConfigError(
                f"`bucket_cap_mb={self.bucket_cap_mb}` leaves no room for a gradient. Give a positive number of MiB, "
                f"or leave it out for torch's own choice."
            )
        powers = (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.BATCHED_POWER_SGD)
        if self.comm_wrapper in powers:
            raise ConfigError(
                f"`comm_wrapper={self.comm_wrapper.value!r}` is no rounding: a wrapper only changes the dtype that "
                f"`comm_hook` sends. Set `comm_wrapper` to fp16, bf16 or no."
            )
        if self.comm_state_option and self.comm_hook not in powers:
            raise ConfigError(
                f"`comm_state_option={self.comm_state_option}` has no effect with "
                f"`comm_hook={self.comm_hook.value!r}`, "
                f"which keeps no state. Leave it out, or set `comm_hook` to power_sgd or batched_power_sgd."
            )


def _hook_type(name: str, value: DDPCommunicationHookType | str) -> DDPCommunicationHookType:
    try:
        return DDPCommunicationHookType(value)
    except ValueError:
        raise ConfigError(
            f"`{name}={value!r}` is no way to exchange gradients. "
            f"Use one of {', '.join(each.value for each in DDPCommunicationHookType)}."
        ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class InitProcessGroupKwargs:
    """How the process group is opened. Ignored in a world of one process, which has none, so scripts run in any."""

    backend: str | None = None
    """Name of the ``torch.distributed`` backend; ``None``: the device's own."""
    timeout: timedelta | None = None
    """How long a collective waits for its peers; ``None``: half an hour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientAccumulationPlugin:
    """How micro-batches make up a window, after which the optimizer steps."""

    num_steps: int
    """Micro-batches in a window; ``accumulate(model, num_steps=...)`` sets it for the windows of some models."""
    sync_with_dataloader: bool = True
    """Whether a window ends with the epoch, however many micro-batches it holds by then."""
    sync_each_batch: bool | None = None
    """Whether gradients are exchanged after every micro-batch: more traffic, less memory where they are sharded.
    ``None`` leaves it to the strategy: sharded models exchange each time, since a gradient that is kept local is as
    large as the whole model; others once a window."""

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)


def check_num_steps(num_steps: int) -> None:
    """Refuse what is no number of micro-batches.

    Raises:
        ConfigError: unless it is a positive integer.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ConfigError(
            f"`num_steps={num_steps!r}` is not a number of micro-batches: a window holds at least one. "
            f"Give a positive integer."
        )
