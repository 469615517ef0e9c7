"""Doing something on some processes only, on some first, or on each with its part of the inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, overload

import numpy as np
import torch

from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.topology import Topology

__all__ = [
    "local_main_process_first",
    "main_process_first",
    "on_last_process",
    "on_local_main_process",
    "on_local_process",
    "on_main_process",
    "on_process",
    "print_main",
    "split_between_processes",
]

P = ParamSpec("P")
R = TypeVar("R")

_Decorator = Callable[[Callable[P, R]], Callable[P, "R | None"]]


def on_main_process(fn: Callable[P, R]) -> Callable[P, R | None]:
    """`fn`, called on rank 0 only; elsewhere it gives ``None``. Which rank this is, is asked at each call."""
    return _only(fn, lambda topology: topology.is_main)


def on_local_main_process(fn: Callable[P, R]) -> Callable[P, R | None]:
    """`fn`, called on the first rank of each node only; elsewhere it gives ``None``."""
    return _only(fn, lambda topology: topology.is_local_main)


def on_last_process(fn: Callable[P, R]) -> Callable[P, R | None]:
    """`fn`, called on the last rank only; elsewhere it gives ``None``."""
    return _only(fn, lambda topology: topology.is_last)


@overload
def on_process(fn: Callable[P, R], *, process_index: int) -> Callable[P, R | None]: ...
@overload
def on_process(fn: None = None, *, process_index: int) -> _Decorator[..., Any]: ...
def on_process(fn: Callable[..., Any] | None = None, *, process_index: int) -> Callable[..., Any]:
    """`fn`, called on rank `process_index` only; without `fn`, a decorator that makes it so.

    Raises:
        ConfigError: at the call, if there is no such rank.
    """
    if fn is None:
        return functools.partial(on_process, process_index=process_index)
    return _only(fn, lambda topology: topology.rank == _existing(process_index, topology.world_size, "process_index"))


@overload
def on_local_process(fn: Callable[P, R], *, local_process_index: int) -> Callable[P, R | None]: ...
@overload
def on_local_process(fn: None = None, *, local_process_index: int) -> _Decorator[..., Any]: ...
def on_local_process(fn: Callable[..., Any] | None = None, *, local_process_index: int) -> Callable[..., Any]:
    """`fn`, called on the rank of that number on each node only; without `fn`, a decorator that makes it so.

    Raises:
        ConfigError: at the call, if this node has no such rank.
    """
    if fn is None:
        return functools.partial(on_local_process, local_process_index=local_process_index)

    def chosen(topology: Topology) -> bool:
        wanted = _existing(local_process_index, topology.local_world_size, "local_process_index")
        return topology.local_rank == wanted

    return _only(fn, chosen)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Every rank must enter this. Rank 0 goes through the body first, then all others at once.

    If rank 0 raises in it, the others go on: they do not hang.
    """
    with _first(lambda topology: topology.is_main):
        yield


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """Every rank must enter this. The first rank of each node goes through the body first, then all others."""
    with _first(lambda topology: topology.is_local_main):
        yield


def print_main(*args: Any, **kwargs: Any) -> None:
    """``print`` on rank 0 only."""
    if _topology().is_main:
        print(*args, **kwargs)


@contextmanager
def split_between_processes(inputs: Any, *, apply_padding: bool = False) -> Iterator[Any]:
    """This rank's part of `inputs`: contiguous, in order of rank, sizes at most one apart, the first ones longer.

    Nothing is doubled and nothing lost, so the parts, gathered in order, are the inputs again. Where there are fewer
    inputs than ranks, the last ranks get an empty part.

    Args:
        inputs: a list, tuple or other sequence, a tensor or array (split along dimension 0), a ``datasets.Dataset``,
            or a mapping whose values are such things of one length.
        apply_padding: repeat the last input where a part is one short, so that all parts have one size.
            Those repetitions are at the end of a part; drop them after gathering.

    Raises:
        ConfigError: if `inputs` cannot be split, the lengths of a mapping's values differ, or there is nothing
            to repeat.
    """
    topology = _topology()
    yield _part(inputs, topology.rank, topology.world_size, apply_padding)


def _topology() -> Topology:
    """Before a process is open, this is a world of one."""
    return Process.current().topology if Process.is_open() else Topology()


def _only(fn: Callable[P, R], chosen: Callable[[Topology], bool]) -> Callable[P, R | None]:
    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return fn(*args, **kwargs) if chosen(_topology()) else None

    return call


def _existing(index: int, count: int, name: str) -> int:
    if not 0 <= index < count:
        raise ConfigError(
            f"`{name}={index}` is none of {count} process(es), so nobody would make the call. "
            f"Give a number from 0 to {count - 1}."
        )
    return index


@contextmanager
def _first(chosen: Callable[[Topology], bool]) -> Iterator[None]:
    process = Process.current() if Process.is_open() else None
    first = process is None or chosen(process.topology)
    if process is not None and not first:
        process.barrier()
    try:
        yield
    finally:
        # Also when the body raised: the others wait for this.
        if process is not None and first:
            process.barrier()


def _part(inputs: Any, rank: int, world_size: int, apply_padding: bool) -> Any:
    if isinstance(inputs, Mapping):
        lengths = {key: _length(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(
                f"The values to split have different lengths ({lengths}), so their parts would not belong together. "
                f"Give values of one length, or split them one by one."
            )
        return {key: _part(value, rank, world_size, apply_padding) for key, value in inputs.items()}
    length = _length(inputs)
    size, longer = divmod(length, world_size)
    start = rank * size + min(rank, longer)
    stop = start + size + (rank < longer)
    if not apply_padding or stop - start == size + (longer > 0):
        return inputs.select(range(start, stop)) if _is_dataset(inputs) else inputs[start:stop]
    return _padded(inputs, start, stop, length)


def _padded(inputs: Any, start: int, stop: int, length: int) -> Any:
    """Rows `start` to `stop` and the last row once more. A part is never more than one short."""
    if isinstance(inputs, torch.Tensor):
        return torch.cat([inputs[start:stop], inputs[length - 1 :]])
    if isinstance(inputs, np.ndarray):
        return np.concatenate([inputs[start:stop], inputs[length - 1 :]])
    if _is_dataset(inputs):
        return inputs.select([*range(start, stop), length - 1])
    if isinstance(inputs, range):
        return [*inputs[start:stop], inputs[length - 1]]
    return inputs[start:stop] + inputs[length - 1 :]


def _is_dataset(inputs: Any) -> bool:
    """Whether rows are taken with ``select``, as from a ``datasets.Dataset``. A tensor's means another thing."""
    return hasattr(inputs, "select") and hasattr(inputs, "__len__") and not isinstance(inputs, (torch.Tensor, type))


def _length(inputs: Any) -> int:
    splittable = isinstance(inputs, (Sequence, torch.Tensor, np.ndarray)) or _is_dataset(inputs)
    if not splittable or isinstance(inputs, (str, bytes)) or getattr(inputs, "ndim", 1) == 0:
        raise ConfigError(
            f"A {type(inputs).__name__} was given to `split_between_processes`, and it has no rows to divide. "
            f"Give a list, a tuple, a tensor, a dataset, or a dict of them."
        )
    return len(inputs)
