"""How many processes each kind of parallelism gets: what users set, and the mesh that it makes. Needs no process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from accel_state.errors import ConfigError
from accel_state.topology import MeshShape

__all__ = [
    "ContextBackend",
    "DeepSpeedSequenceParallelConfig",
    "ParallelismConfig",
    "SequenceBackend",
    "TorchContextParallelConfig",
]

ContextBackend = Literal["native", "torch"]
SequenceBackend = Literal["native", "deepspeed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchContextParallelConfig:
    """Options of ``cp_backend="torch"``, torch's ring attention."""

    cp_comm_strategy: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values travel round the ring."""

    def __post_init__(self) -> None:
        if self.cp_comm_strategy not in ("allgather", "alltoall"):
            raise ConfigError(
                f"`cp_comm_strategy={self.cp_comm_strategy!r}` is no way for keys and values to travel. "
                f"Use 'allgather' or 'alltoall'."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedSequenceParallelConfig:
    """Options of ``sp_backend="deepspeed"``, the Ulysses attention of its ALST (arXiv:2506.13996)."""

    sp_seq_length: int | None = None
    """Tokens of every sequence, over all ranks; another length is refused. ``None`` takes any."""
    sp_seq_length_is_variable: bool | None = None
    """Whether lengths may differ from batch to batch. ``None``: unless `sp_seq_length` is given."""
    sp_attn_implementation: str | None = None
    """What computes attention once each rank holds whole sequences, as transformers names it: ``"sdpa"``,
    ``"flash_attention_2"``, ``"flash_attention_3"``. It has to be what the model was loaded with, which ``None``
    takes."""

    def __post_init__(self) -> None:
        length, variable = self.sp_seq_length, self.sp_seq_length_is_variable
        if length is not None and (type(length) is not int or length < 1):
            raise ConfigError(
                f"`sp_seq_length={length!r}` is no number of tokens. Give that of a whole sequence, or leave it out "
                f"for any length."
            )
        if variable is not None and not isinstance(variable, bool):
            raise ConfigError(
                f"`sp_seq_length_is_variable={variable!r}` is neither true nor false. Give True or False."
            )
        if length is not None and variable:
            raise ConfigError(
                f"`sp_seq_length={length}` has no effect with `sp_seq_length_is_variable=True`, under which lengths "
                f"are those of the batches. Leave out one of the two."
            )
        if length is None and variable is False:
            raise ConfigError(
                "`sp_seq_length_is_variable=False` says that all sequences have one length, and not which. Give "
                "`sp_seq_length`, or leave it out."
            )
        self._check_implementation()

    @property
    def is_variable(self) -> bool:
        """Whether lengths may differ from batch to batch."""
        return self.sp_seq_length is None

    def _check_implementation(self) -> None:
        name = self.sp_attn_implementation
        if name is None:
            return
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"`sp_attn_implementation={name!r}` names no attention. Use 'sdpa', 'flash_attention_2' or "
                f"'flash_attention_3', or leave it out for that of the model."
            )
        if name in REFUSED_ATTENTION:
            raise ConfigError(
                f"`sp_attn_implementation={name!r}` computes with {REFUSED_ATTENTION[name]}. Use 'sdpa', "
                f"'flash_attention_2' or 'flash_attention_3'."
            )


REFUSED_ATTENTION = {
    "eager": "a mask over one rank's tokens, and without one it is not causal",
    "paged|eager": "a cache of keys and values, which a divided sequence has none of",
    "flex_attention": "a mask that DeepSpeed replaces by a causal one, whatever it was",
}
"""Attention of transformers that DeepSpeed's cannot stand around, and what it computes with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """Number of processes along each axis of parallelism. Their product is the number of processes launched.

    Neighbouring ranks differ along ``tp`` first, then ``sp``, ``cp``, ``dp_shard`` and ``dp_replicate``.
    """

    dp_replicate_size: int = 1
    """Copies of the model; gradients are averaged over them."""
    dp_shard_size: int = 1
    """Processes that share one copy of the model in shards (FSDP2) and see different data."""
    tp_size: int = 1
    """Tensor parallel: processes that share each matrix multiplication."""
    cp_size: int = 1
    """Context parallel: processes that share one sequence, and exchange keys and values."""
    sp_size: int = 1
    """Sequence parallel (Ulysses): processes that share one sequence, and exchange heads for tokens in attention."""
    cp_backend: ContextBackend = "native"
    """``"native"`` gathers keys and values on any device; ``"torch"`` is torch's ring attention, on CUDA only."""
    sp_backend: SequenceBackend = "native"
    """How heads are exchanged for tokens: ``"native"``, by ``all_to_all`` on any device, or ``"deepspeed"``, by its
    own attention for models of transformers that DeepSpeed trains."""
    cp_handler: TorchContextParallelConfig | None = None
    """Options of ``cp_backend="torch"``; refused with another."""
    sp_handler: DeepSpeedSequenceParallelConfig | None = None
    """Options of ``sp_backend="deepspeed"``; refused with another."""
    tp_plan: dict[str, str] | None = None
    """How modules are divided along ``tp``, by pattern of their names; ``None`` takes the plan that the model
    brings."""
    loss_parallel: bool = False
    """Whether a tensor-parallel output layer leaves logits divided by vocabulary. Compute the loss, a model's own too,
    inside `with loss_parallel():`, where ``cross_entropy`` takes them so."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"`{name}={value!r}` is not a number of processes: an axis holds at least one. Give a positive "
                    f"integer, or leave it out for 1."
                )
        if self.tp_plan is not None and not isinstance(self.tp_plan, Mapping):
            raise ConfigError(
                f"`tp_plan={self.tp_plan!r}` is no plan. Give a dict with a style for each pattern of module names, or "
                f"leave it out for the plan that the model brings."
            )
        for name, value, known in (
            ("cp_backend", self.cp_backend, get_args(ContextBackend)),
            ("sp_backend", self.sp_backend, get_args(SequenceBackend)),
        ):
            if value not in known:
                raise ConfigError(
                    f"`{name}={value!r}` is not available in this version. Use {' or '.join(map(repr, known))}."
                )
        self._refuse_without_effect()

    def mesh_shape(self) -> MeshShape:
        """The mesh that these sizes make.

        Raises:
            ConfigError: for a size that is no number of processes.
        """
        return MeshShape(
            dp_replicate=self.dp_replicate_size,
            dp_shard=self.dp_shard_size,
            cp=self.cp_size,
            sp=self.sp_size,
            tp=self.tp_size,
        )

    @property
    def total_size(self) -> int:
        """Processes altogether."""
        return self.mesh_shape().size

    def check_world(self, world_size: int) -> None:
        """Refuse a world of another size.

        Raises:
            ConfigError: with the product that the sizes make, and how to change it.
        """
        if self.total_size == world_size:
            return
        sizes = " x ".join(f"{name}={getattr(self, name)}" for name in _SIZES if getattr(self, name) > 1) or "1"
        rest = self.total_size // self.dp_shard_size
        fits = world_size % rest == 0
        remedy = f"Set `dp_shard_size={world_size // rest}`, or launch" if fits else "Launch"
        raise ConfigError(
            f"`ParallelismConfig` asks for {sizes} = {self.total_size} process(es), but the world has {world_size}. "
            f"{remedy} {self.total_size}."
        )

    def _refuse_without_effect(self) -> None:
        problems: tuple[tuple[str, Any, bool, str], ...] = (
            ("cp_backend", self.cp_backend, self.cp_backend != "native" and self.cp_size == 1, "`cp_size=1`"),
            ("cp_handler", self.cp_handler, self.cp_handler is not None and self.cp_backend != "torch",
             f"`cp_backend={self.cp_backend!r}`, which has no options"),
            ("sp_backend", self.sp_backend, self.sp_backend != "native" and self.sp_size == 1, "`sp_size=1`"),
            ("sp_handler", self.sp_handler, self.sp_handler is not None and self.sp_backend != "deepspeed",
             f"`sp_backend={self.sp_backend!r}`, which has no options"),
            ("tp_plan", self.tp_plan, self.tp_plan is not None and self.tp_size == 1, "`tp_size=1`"),
            ("loss_parallel", self.loss_parallel, self.loss_parallel and self.tp_size == 1, "`tp_size=1`"),
        )  # fmt: skip
        for name, value, without_effect, because in problems:
            if without_effect:
                raise ConfigError(f"`{name}={value!r}` has no effect with {because}. Leave it out, or change that.")
        if self.cp_size > 1 and self.sp_size > 1:
            raise ConfigError(
                f"`cp_size={self.cp_size}` and `sp_size={self.sp_size}` would divide one sequence in two ways, and "
                f"attention can be exchanged in one. Set one of them to 1."
            )
        length = None if self.sp_handler is None else self.sp_handler.sp_seq_length
        if length is not None and length % self.sp_size:
            below, above = length // self.sp_size * self.sp_size, -(-length // self.sp_size) * self.sp_size
            raise ConfigError(
                f"`sp_seq_length={length}` cannot be divided evenly over `sp_size={self.sp_size}` ranks. Pad or cut "
                f"sequences to {f'{below} or ' if below else ''}{above} tokens."
            )


_SIZES = ("dp_replicate_size", "dp_shard_size", "cp_size", "sp_size", "tp_size")
