"""Candidates of ZeRO: stages, what is kept in host memory, and the buffers that DeepSpeed works with. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from accel_parallel.auto.layout import Layout
from accel_state.errors import ConfigError

__all__ = ["LEAN", "ZeroLayout", "ZeroSizes", "zero_layouts"]

HostDevice = Literal["none", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroSizes:
    """Buffers of DeepSpeed, in elements, as ``zero_optimization`` names them. Defaults are those of DeepSpeed 0.19."""

    reduce_bucket_size: int = 500_000_000
    """Gradients that are exchanged at once. The bucket is made at this size, however small the model."""
    stage3_prefetch_bucket_size: int = 50_000_000
    """Parameters that each module asks for ahead of their use. As a module asks for more than it uses, what is gathered
    ahead grows up to the next limit."""
    stage3_max_live_parameters: int = 1_000_000_000
    """Gathered parameters beyond which nothing is gathered ahead."""
    stage3_max_reuse_distance: int = 1_000_000_000
    """Parameters that are used again sooner stay gathered after forward."""
    sub_group_size: int = 1_000_000_000
    """Parameters of a rank's part that stage 3 steps over at once."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            size = getattr(self, name)
            least = 1 if name in ("reduce_bucket_size", "sub_group_size") else 0
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise ConfigError(
                    f"`zero_optimization.{name}` is {size!r}, which is no number of elements. "
                    f"Give an integer of at least {least}."
                )

    @property
    def gathered_ahead(self) -> int:
        """Parameters that may be gathered besides current ones, at stage 3: ahead of their use, or till backward."""
        ahead = self.stage3_max_live_parameters if self.stage3_prefetch_bucket_size else 0
        return max(ahead, self.stage3_max_reuse_distance // 2)  # as far again in backward

    @classmethod
    def of(cls, section: Mapping[str, Any], *, hidden_size: int | None = None) -> ZeroSizes:
        """What a ``zero_optimization`` section says.

        Args:
            section: entries that are missing, or ``"auto"`` without a width, are DeepSpeed's defaults.
            hidden_size: width of the model, from which ``"auto"`` is filled: h², and 0.9 h² for prefetching.
        """
        sizes: dict[str, int] = {}
        width = 0 if hidden_size is None else hidden_size * hidden_size
        filled = {"reduce_bucket_size": width, "stage3_prefetch_bucket_size": int(0.9 * width)}
        for name in cls.__dataclass_fields__:
            value = section.get(name)
            if value == "auto":
                value = filled.get(name) or None
            if value is not None:
                sizes[name] = int(value) if isinstance(value, float) and value.is_integer() else value
        return cls(**sizes)


LEAN = ZeroSizes(
    reduce_bucket_size=50_000_000, stage3_prefetch_bucket_size=10_000_000, stage3_max_live_parameters=50_000_000,
    stage3_max_reuse_distance=50_000_000, sub_group_size=100_000_000,
)  # fmt: skip
"""Smaller ones, which are proposed where nothing else fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroLayout(Layout):
    """A candidate: every process has a part of what the stage divides."""

    stage: int
    optimizer_on_host: bool = False
    """Whether weights in float32, optimizer states and the step are on the host, and with them divided gradients."""
    params_on_host: bool = False
    """Whether parameters are there while they are not computed with, at stage 3."""

    @classmethod
    def of(
        cls, stage: int, *, world_size: int, optimizer: bool = False, params: bool = False, checkpointing: bool = False
    ) -> ZeroLayout:
        """`stage` over all processes, with `optimizer` and `params` on the host or not."""
        return cls(
            strategy="fsdp", shard=world_size, reshard=stage == 3, checkpointing=checkpointing,
            offload=optimizer or params, stage=stage, optimizer_on_host=optimizer, params_on_host=params,
        )  # fmt: skip

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Smaller is simpler: less on the host, and of these a lower stage."""
        return (self.params_on_host, self.optimizer_on_host, self.stage)

    def __str__(self) -> str:
        there = {"optimizer": self.optimizer_on_host, "params": self.params_on_host}
        on_host = " and ".join(name for name, is_there in there.items() if is_there)
        return f"zero {self.stage}" + (f", {on_host} on host" if on_host else "")


def zero_layouts(
    *,
    world_size: int,
    offload: bool,
    optimizer: HostDevice | None = None,
    params: HostDevice | None = None,
    checkpointing: bool = False,
) -> Iterator[ZeroLayout]:
    """Every candidate, simpler ones first.

    Args:
        world_size: number of processes.
        offload: whether host memory may be used where nothing is said about it.
        optimizer: where optimizer states are, if that is settled already.
        params: where parameters are, likewise.
        checkpointing: whether blocks are computed a second time in backward.
    """
    for on_host in ((False, False), (True, False), (False, True), (True, True)):
        if on_host == (False, True) and params is None:
            continue  # optimizer states take more, and are needed less often
        if not all(_allowed(said, there, offload) for said, there in zip((optimizer, params), on_host, strict=True)):
            continue
        for stage in range(3 if on_host[1] else 1 if on_host[0] else 0, 4):
            yield ZeroLayout.of(
                stage, world_size=world_size, optimizer=on_host[0], params=on_host[1], checkpointing=checkpointing
            )


def _allowed(said: HostDevice | None, there: bool, offload: bool) -> bool:
    return (said == "cpu") == there if said is not None else offload or not there
