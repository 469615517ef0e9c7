"""The boundary behind which every way of spreading a model lives: one `Strategy`, one file each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from accel_state.process import DistributedType
from accel_state.protocols import LossScaler
from accel_state.topology import Axis

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from accel_parallel.sequence.attention import SequenceParallel

__all__ = ["Bundle", "Duty", "OptimizerState", "Strategy"]


class Duty(str, Enum):
    """Work that a backend may do by itself, so that nobody does it a second time."""

    SCALE = "scale"
    """Scaling the loss of a float16 backward."""
    AVERAGE = "average"
    """Dividing by the number of micro-batches of a window."""
    CLIP = "clip"
    """Clipping gradients inside its step."""
    STEP = "step"
    """Deciding when the optimizer really steps."""
    SAVE = "save"
    """Writing its own checkpoint files."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is prepared together, since a backend may replace the parameters that an optimizer holds."""

    models: tuple[nn.Module, ...] = field(default=())
    optimizers: tuple[Optimizer, ...] = field(default=())
    schedulers: tuple[Any, ...] = field(default=())
    """What is prepared with them; the strategy is told of them, and hands out one by one with `scheduler_for`."""
    batch_size: int | None = None
    """Rows that a rank takes from the loaders of these models, where that is known."""
    num_steps: int = 1
    """Micro-batches of a window, as announced; single windows may have others."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """State of one optimizer, keyed by parameter name instead of position, so it outlives a reordering."""

    state: dict[str, dict[str, Any]]
    """For each parameter name, its entries, such as ``exp_avg``: tensors on the parameter's device, or numbers."""
    groups: list[dict[str, Any]]
    """Hyperparameters of each group; ``params`` lists names, ``param_shapes`` and ``param_dtypes`` what these are."""
    engine: dict[str, Any] = field(default_factory=dict)
    """What else a backend steps by, such as the loss scale that it owns: numbers, or tensors."""


class Strategy(Protocol):
    """How models, their gradients and their optimizers are spread over the processes.

    The `Accelerator` calls it, never branching on which one it is. ``prepare``, the state functions and
    ``clip_grad_norm_`` are called by every rank, in the same order; so is ``backward`` while gradients are exchanged.
    Made by ``cls(process, place=..., options=..., parallelism=..., dynamo=...)``, once ``cls.settings_in`` and
    ``cls.settle_options`` have looked at the options, as of `SingleStrategy`.
    """

    name: str
    owns: frozenset[Duty]
    """What it does by itself. The rest is done for it, through what follows."""
    options_type: type | None
    """Class of the options that users may pass for it; its constructor takes an instance as ``options``."""
    axes: frozenset[Axis]
    """Axes of the mesh along which it can divide the world."""
    distributed_type: DistributedType | None
    """What users see the world as, where that is narrower than its devices tell."""
    sequence: SequenceParallel | None
    """What divides each sequence over ranks, where that was asked for."""
    device_mesh: DeviceMesh | None
    """The world by axes, where the strategy divides it along any but data."""
    exchanges_each_batch: bool
    """Whether gradients are exchanged after each micro-batch of a window unless the user says otherwise: cheaper in
    memory where gradients are sharded, while keeping them local needs a whole copy."""
    reduce_found_inf: Callable[[torch.Tensor], None] | None
    """For the loss scaler: makes a flag greater than zero on all ranks where it is on any; ``None`` where all ranks
    hold equal gradients and so agree."""

    def trained_parameters(self, optimizer: Optimizer) -> list[torch.Tensor]:
        """The parameters of models that `optimizer` trains, which may hold others, such as flat parts of them."""

    @property
    def fills_meta(self) -> bool:
        """Whether `prepare` gives values to parameters on the meta device."""

    @property
    def state_layout(self) -> str:
        """``"full"``: the main process saves whole tensors; ``"sharded"``: each rank saves its parts."""

    @property
    def average_size(self) -> int:
        """Over how many ranks `backward` averages gradients; 1 where it does not."""

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over the ranks that see different data, on each of them. Refused inside `join`."""

    def prepare(self, bundle: Bundle) -> Bundle:
        """Move, wrap or shard the models, and let the optimizers follow. Same lengths, same order."""

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Add the gradients of `loss`, averaged over `average_size` ranks unless inside `no_sync`."""

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """While open, forward and backward through `model` keep gradients local."""

    def sync_in_backward(self, model: nn.Module) -> AbstractContextManager[Any]:
        """While open, `backward` exchanges the gradients of `model`, also those of forwards inside `no_sync`.

        What is exchanged is what the parameters hold by then, earlier micro-batches included.
        """

    def join(
        self, models: Sequence[nn.Module], *, settle: Callable[[int], None] | None = None
    ) -> AbstractContextManager[None]:
        """While open, ranks may do different numbers of forward and backward passes through `models`.

        Gradients are averaged over the ranks that are still inside. At the end, where all ranks meet, every rank has
        the parameters and buffers of one that left last; then `settle` is called on each rank with the number of
        that one, for whatever else has to be alike. It is not called where there is nobody to differ from.
        `no_sync` is refused inside, since a rank that leaves would take its gradients along.

        Raises:
            ConfigError: for models or options for which nobody can stand in.
        """

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        """Scale the gradients so that their common norm is at most `max_norm`. Returns the norm before, a scalar."""

    def grad_norm(self, parameters: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
        """The norm that `clip_grad_norm_` would see, a scalar."""

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        """Bound every entry of the gradients."""

    def scale_gradients_(self, parameters: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
        """Multiply the gradients of a window that is complete, before its step; a tensor as `factor` is a scalar."""

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Drop the gradients of all that `optimizer` trains."""

    def step(self, optimizer: Optimizer, *, scaler: LossScaler, closure: Callable[[], Any] | None = None) -> bool:
        """Step. False: the gradients were not finite, and nothing was changed."""

    def model_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by fully qualified name, as this rank holds them."""

    def load_model_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copy `state` in. Raises `CheckpointError` naming what is missing, extra or of another shape."""

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> OptimizerState:
        """State of `optimizer`, its parameters called as `names` says."""

    def load_optimizer_state(
        self, optimizer: Optimizer, names: Mapping[torch.Tensor, str], state: OptimizerState
    ) -> None:
        """Put it back. Raises `CheckpointError` naming the parameters that do not fit."""

    def full_state(self, model: nn.Module, *, everywhere: bool = True) -> dict[str, torch.Tensor]:
        """The whole model by fully qualified name, gathered where it is sharded.

        Args:
            model: a prepared one.
            everywhere: ``False`` gathers tensor by tensor into the main process's host memory, and gives others nothing
                where that needs gathering.
        """

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module that the user handed in."""

    def scheduler_for(self, scheduler: Any, optimizer: Optimizer) -> Any:
        """What really schedules the rates of a prepared `optimizer`: `scheduler`, unless that stands for another.

        Raises:
            ConfigError: for one that stands for something that this strategy has not.
        """

    def explain(self) -> list[str]:
        """Lines on what a backend was configured to do, for each model that was prepared; none where nothing was."""

    def release(self) -> None:
        """Let go of all that was prepared, and of what it took of the process for that. Every rank must call this."""
