"""The members of `Accelerator` that only speak of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from accel.exporting import save_tensors
from accel_state import collectives, execution
from accel_state.process import DistributedType, Process

__all__ = ["ProcessView"]

F = TypeVar("F", bound=Callable[..., Any])


class ProcessView:
    """This process among its peers. Base of `Accelerator`; works with any open `Process`."""

    process: Process
    """The open process."""
    _triggered = False
    """Whether `set_trigger` was called here since the last `check_trigger` that found any."""

    @property
    def device(self) -> torch.device:
        """Device that models and batches are put on."""
        return self.process.device

    @property
    def distributed_type(self) -> DistributedType:
        """Kind of world."""
        return self.process.distributed_type

    @property
    def num_processes(self) -> int:
        """Processes altogether."""
        return self.process.topology.world_size

    @property
    def process_index(self) -> int:
        """Number of this process, from 0."""
        return self.process.topology.rank

    @property
    def local_process_index(self) -> int:
        """Number of this process on its node, from 0."""
        return self.process.topology.local_rank

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.process.topology.world_size > 1

    @property
    def data_parallel_rank(self) -> int:
        """Which part of each global batch this process sees; those that share samples have the same."""
        return self.process.topology.data_rank

    @property
    def tensor_parallel_rank(self) -> int:
        """Place among the processes that share each matrix multiplication."""
        return self.process.topology.coord("tp")

    @property
    def context_parallel_rank(self) -> int:
        """Place among the processes that share each sequence by exchanging keys and values."""
        return self.process.topology.coord("cp")

    @property
    def sequence_parallel_rank(self) -> int:
        """Place among the processes that share each sequence by exchanging heads for tokens."""
        return self.process.topology.coord("sp")

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first process of all."""
        return self.process.topology.is_main

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its node."""
        return self.process.topology.is_local_main

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last process of all."""
        return self.process.topology.is_last

    def save(self, obj: Mapping[str, torch.Tensor], f: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write tensors by name as one safetensors file, from the main process only; nothing is pickled.

        Fits ``save_pretrained(..., save_function=accelerator.save)``.

        Args:
            obj: tensors by name.
            f: path of the file.
            metadata: of the file, besides ``format``.
        """
        if self.is_main_process:
            save_tensors(obj, Path(f), metadata=metadata)

    def wait_for_everyone(self) -> None:
        """Wait until all processes are here. Every rank must call this."""
        self._together("wait_for_everyone").barrier()

    def set_trigger(self) -> None:
        """Let the next `check_trigger` be true on every process, as where one of them found a loss of NaN.

        Exchanges nothing: any process may call it, at any time.
        """
        self._triggered = True

    def check_trigger(self) -> bool:
        """Whether any process called `set_trigger` since the last check that was true. Every rank must call this.

        One number is exchanged, and waited for, so check once a step or less. Once true, all triggers are reset.
        """
        process = self._together("check_trigger")
        flag = torch.tensor(int(self._triggered), dtype=torch.int32, device=process.device)
        if not collectives.reduce(flag, "max", process=process).item():
            return False
        self._triggered = False
        return True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on the main process of each node; nothing elsewhere."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def on_main_process(self, function: F) -> F:
        """Decorator: run on the main process only; elsewhere the call returns ``None``."""
        return execution.on_main_process(function)  # type: ignore[return-value]

    def on_local_main_process(self, function: F) -> F:
        """Decorator: run on the main process of each node only."""
        return execution.on_local_main_process(function)  # type: ignore[return-value]

    def on_last_process(self, function: F) -> F:
        """Decorator: run on the last process only."""
        return execution.on_last_process(function)  # type: ignore[return-value]

    def on_process(self, function: F | None = None, *, process_index: int) -> Any:
        """Decorator: run on one process only. Also ``@accelerator.on_process(process_index=1)``."""
        if function is None:
            return execution.on_process(process_index=process_index)
        return execution.on_process(function, process_index=process_index)

    def on_local_process(self, function: F | None = None, *, local_process_index: int) -> Any:
        """Decorator: run on one process of each node only."""
        if function is None:
            return execution.on_local_process(local_process_index=local_process_index)
        return execution.on_local_process(function, local_process_index=local_process_index)

    def main_process_first(self) -> AbstractContextManager[None]:
        """The main process runs the block first, the others after it. Every rank must enter."""
        self._together("main_process_first")
        return execution.main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """The main process of each node runs the block first. Every rank must enter."""
        self._together("local_main_process_first")
        return execution.local_main_process_first()

    @contextmanager
    def split_between_processes(self, inputs: Any, *, apply_padding: bool = False) -> Iterator[Any]:
        """This process's contiguous part of `inputs`; gathered in order they are `inputs` again."""
        with execution.split_between_processes(inputs, apply_padding=apply_padding) as part:
            yield part

    def gather(self, tree: Any) -> Any:
        """Tensors of all ranks, one after the other along dim 0, on every rank. Every rank must call this.

        Shapes must agree over the ranks; padding in a last batch is kept (see `gather_for_metrics`).
        """
        return collectives.gather(tree, process=self._together("gather"))

    def gather_object(self, entries: Any) -> list[Any]:
        """Python objects of all ranks in one list, pickled on the way. Every rank must call this."""
        return collectives.gather_object(entries, process=self._together("gather_object"))

    def reduce(
        self, tree: Any, reduction: Literal["mean", "sum", "max", "min", "none"] = "mean", scale: float = 1.0
    ) -> Any:
        """Tensors of all ranks made into one, entry by entry, on every rank. Every rank must call this."""
        return collectives.reduce(tree, reduction, scale, process=self._together("reduce"))

    def broadcast(self, tree: Any, from_process: int = 0) -> Any:
        """The tensors of one rank, on every rank. Every rank must call this, with tensors of those shapes."""
        return collectives.broadcast(tree, from_process, process=self._together("broadcast"))

    def pad_across_processes(self, tree: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Tensors padded along `dim` to the longest of all ranks, so that they can be gathered.

        Every rank must call this.
        """
        return collectives.pad_across_processes(
            tree, dim, pad_index, pad_first, process=self._together("pad_across_processes")
        )

    def _together(self, what: str) -> Process:
        """The process, for `what`, which all ranks do together."""
        return self.process
