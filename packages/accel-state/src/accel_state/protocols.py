"""The vocabulary in which packages that do not import one another talk: protocols and plain records.

Imports no torch at run time, so that the launcher can read it for free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import torch

__all__ = [
    "BatchInfo",
    "LoaderObserver",
    "LossScaler",
    "Precision",
    "Stateful",
    "StatefulLoader",
    "Tracker",
]

T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Stateful(Protocol):
    """Anything a checkpoint can hold. The state is JSON values and tensors in dicts and lists, nothing else."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class BatchInfo(NamedTuple):
    """What a loader knows of the batch it has just handed out; the same on every rank but for nothing.

    A named tuple, since one is made for every batch, and a frozen dataclass takes three times as long to make.
    """

    epoch: int
    """Epoch that the batch belongs to, from 0."""
    index: int  # type: ignore[assignment] # hides `tuple.index`, which nobody needs here
    """Number of the global batch in its epoch, from 0."""
    rows: tuple[int, ...]
    """Samples that each data rank received in this step, padding included."""
    real_rows: tuple[int, ...]
    """How many of those are real: always the first ones of a rank's batch. The rest repeat other samples."""
    remaining: int | None
    """Batches that follow in this epoch; ``None`` where that is not known, but then it is not 0."""
    may_pad: bool
    """Whether any batch of this epoch holds padding, or may."""

    @property
    def is_last(self) -> bool:
        """Whether the epoch ends with this batch."""
        return self.remaining == 0

    @property
    def num_real(self) -> int:
        """Real samples of this step over all ranks."""
        return sum(self.real_rows)


@runtime_checkable
class LoaderObserver(Protocol):
    """Told by a loader what it does. Calls come in the process's own thread, in this order."""

    def loader_started(self, loader: StatefulLoader[Any]) -> None: ...
    def batch_delivered(self, loader: StatefulLoader[Any], info: BatchInfo) -> None: ...

    def loader_ended(self, loader: StatefulLoader[Any]) -> None:
        """The epoch is over, or its iteration was given up with ``break`` or an exception."""


@runtime_checkable
class StatefulLoader(Protocol[T_co]):
    """A loader that is sharded already and knows its place.

    Iterating it finishes the epoch in progress from its cursor and then moves on to the next one::

        for epoch in range(loader.epoch, num_epochs):
            for batch in loader: ...
    """

    observer: LoaderObserver | None

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the next one where none is."""

    @property
    def batch_info(self) -> BatchInfo | None:
        """The batch handed out last in the iteration in progress; ``None`` outside one."""

    def __iter__(self) -> Iterator[T_co]: ...
    def __len__(self) -> int:
        """Batches a rank receives in a whole epoch."""

    def state_dict(self, *, rewind: int = 0) -> dict[str, Any]:
        """JSON values only. `rewind` batches before the cursor, for a window that is not finished."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...
    def skip_first(self, num_batches: int) -> StatefulLoader[T_co]:
        """A loader over the same data whose next iteration leaves the first batches of the epoch out."""

    def close(self) -> None:
        """Give up what it shares with other ranks. Every rank must; it cannot be iterated afterwards."""


@runtime_checkable
class LossScaler(Protocol):
    """Keeps small gradients of a float16 backward from vanishing (Micikevicius et al., arXiv:1710.03740)."""

    enabled: bool
    reduce_found_inf: Callable[[torch.Tensor], None] | None
    """Called once by each `unscale_` with a flag, to make it greater than zero on all ranks where it is on any."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` times the current scale, differentiable."""

    def unscale_(self, optimizer: torch.optim.Optimizer, gradients: Iterable[torch.Tensor]) -> None:
        """Divide `gradients`, those of `optimizer`, by the scale in place and note whether any is not finite.

        A second call before `step` does nothing, so clipping and stepping may both ask for it.
        """

    def step(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> bool:
        """Call `step` unless `unscale_` found a gradient that is not finite. Returns whether it was called."""

    def update(self) -> None:
        """Adapt the scale to what happened since the last call. Only between accumulation windows."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@runtime_checkable
class Precision(Protocol):
    """In which dtypes a model computes."""

    @property
    def name(self) -> str: ...
    @property
    def scaler(self) -> LossScaler: ...

    def check(self, model: torch.nn.Module, *, name: str = "model") -> None:
        """Refuse a model that cannot be trained in this precision, naming the parameter.

        Raises:
            ConfigError: for example float16 parameters under float16 loss scaling.
        """

    def forward_context(self) -> AbstractContextManager[Any]:
        """The context in which a forward pass runs."""

    def wrap_forward(self, model: torch.nn.Module) -> torch.nn.Module:
        """Let `model` run its forward in that context. Done once; returns the same module."""

    def unwrap_forward(self, model: torch.nn.Module) -> torch.nn.Module:
        """Undo `wrap_forward`; does nothing to a model that was not wrapped."""


@runtime_checkable
class Tracker(Protocol):
    """Somewhere metrics go. Called on the main process only."""

    @property
    def name(self) -> str: ...

    def start(self, run: str, *, config: Mapping[str, Any]) -> None:
        """Begin a run called `run` with these hyperparameters. Called once, before anything is logged."""

    def log(self, values: Mapping[str, Any], *, step: int | None) -> None: ...
    def finish(self) -> None:
        """Write out whatever is held back. Called once, also when training failed."""
