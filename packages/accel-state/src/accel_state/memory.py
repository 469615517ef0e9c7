"""Running out of memory, and giving it back."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch

from accel_state.device import DEVICES
from accel_state.errors import BatchSizeError, ConfigError
from accel_state.process import Process

__all__ = ["clear_device_cache", "find_executable_batch_size", "is_out_of_memory", "release_memory"]

R = TypeVar("R")

# What allocators write, in lower case, where they do not raise torch.OutOfMemoryError.
_MESSAGES = (
    "out of memory",  # CUDA, XPU, NPU, MPS and their runtimes
    "can't allocate memory",  # DefaultCPUAllocator
    "not enough memory",  # DefaultCPUAllocator on Windows
    "cudnn_status_not_supported",  # cuDNN, where a workspace does not fit
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "out_of_device_memory",  # Level Zero under XPU
    "out_of_host_memory",
    "resource_exhausted",  # XLA
)


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give memory that torch keeps for reuse back to the device's driver.

    Args:
        garbage_collection: first collect objects that refer to each other.
    """
    if garbage_collection:
        gc.collect()
    kinds = [Process.current().kind] if Process.is_open() else [k for k in DEVICES.values() if k.plugin is None]
    for kind in kinds:
        if kind.type != "cpu" and kind.is_available():
            kind.call("empty_cache")


def release_memory(*objects: Any) -> list[None]:
    """Collect garbage, empty the device's cache, and give one ``None`` for each object, to overwrite its name with::

        model, optimizer = release_memory(model, optimizer)

    An object goes when its last name does, which is after this call; its memory is then torch's to reuse.
    To see it at the driver, call `clear_device_cache` once more.
    """
    clear_device_cache(garbage_collection=True)
    return [None] * len(objects)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device, by the error's type or by what allocators write."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(message in text for message in _MESSAGES)


@overload
def find_executable_batch_size(
    function: Callable[..., R],
    *,
    starting_batch_size: int = 128,
    reduce: Callable[[int], int] | None = None,
    min_batch_size: int = 1,
) -> Callable[..., R]: ...
@overload
def find_executable_batch_size(
    function: None = None,
    *,
    starting_batch_size: int = 128,
    reduce: Callable[[int], int] | None = None,
    min_batch_size: int = 1,
) -> Callable[[Callable[..., R]], Callable[..., R]]: ...
def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    *,
    starting_batch_size: int = 128,
    reduce: Callable[[int], int] | None = None,
    min_batch_size: int = 1,
) -> Callable[..., Any]:
    """`function`, called with a batch size before its other arguments, and with smaller ones until memory suffices::

        @find_executable_batch_size(starting_batch_size=256)
        def train(batch_size, model): ...
        train(model)

    The size that worked is where the next call begins. Each process searches alone: a collective cannot be relied
    on in a process that has just failed, so on several ranks, build what communicates inside `function` only if
    all ranks have the same memory, or agree on the result and call `function` with it yourself.

    Args:
        function: takes the batch size first; without it, a decorator is given.
        starting_batch_size: the first to try.
        reduce: the next smaller size for a given one; by default nine tenths, and at least one less.
        min_batch_size: the last worth trying.

    Raises:
        ConfigError: at once, if the sizes make no sense or `function` takes no argument; at the call, if the caller
            passes a batch size itself, or `reduce` does not give a smaller whole number.
        BatchSizeError: at the call, if no size fits. It lists the sizes tried and holds the last error.
    """
    for name, size in (("starting_batch_size", starting_batch_size), ("min_batch_size", min_batch_size)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"`{name}={size!r}` is not a number of samples. Give a positive integer.")
    if min_batch_size > starting_batch_size:
        raise ConfigError(
            f"`min_batch_size={min_batch_size}` is more than `starting_batch_size={starting_batch_size}`, so no size "
            f"could be tried. Start higher, or allow smaller ones."
        )
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce=reduce,
            min_batch_size=min_batch_size,
        )
    return _search(function, starting_batch_size, reduce or _nine_tenths, min_batch_size)


def _search(function: Callable[..., R], start: int, reduce: Callable[[int], int], smallest: int) -> Callable[..., R]:
    signature = inspect.signature(function)
    name = getattr(function, "__name__", repr(function))
    if not signature.parameters:
        raise ConfigError(
            f"`{name}` takes no argument, so it cannot be given a batch size. Let its first parameter be `batch_size`."
        )

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        nonlocal start
        _refuse_batch_size(signature, name, start, args, kwargs)
        size = start
        tried: list[int] = []
        while True:
            clear_device_cache(garbage_collection=bool(tried))
            try:
                result = function(size, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                tried.append(size)
                following = _smaller(reduce, size)
                if following < smallest:
                    raise _exhausted(name, tried, smallest, error) from error
                # The traceback holds the failed attempt's tensors; it goes with this block.
                size = following
            else:
                start = size
                return result

    return call


def _nine_tenths(batch_size: int) -> int:
    return min(batch_size - 1, batch_size * 9 // 10)


def _smaller(reduce: Callable[[int], int], size: int) -> int:
    following = reduce(size)
    if not isinstance(following, int) or isinstance(following, bool) or following >= size:
        raise ConfigError(
            f"`reduce` gave {following!r} after batch size {size}, which is not a smaller whole number, so the search "
            f"would not end. Let it return less than it is given, such as `lambda size: size // 2`."
        )
    return following


def _exhausted(name: str, tried: list[int], smallest: int, error: BaseException) -> BatchSizeError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return BatchSizeError(
        f"`{name}` ran out of memory with every batch size tried: {', '.join(map(str, tried))} "
        f"(`min_batch_size={smallest}`). The last error: {reason} "
        f"Free memory, use a smaller model or a larger device, or allow smaller batches.",
        tried=tuple(tried),
    )


def _refuse_batch_size(
    signature: inspect.Signature, name: str, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        signature.bind(size, *args, **kwargs)
    except TypeError as error:
        first = next(iter(signature.parameters))
        raise ConfigError(
            f"`{name}{signature}` cannot be called with a batch size before the arguments given ({error}): `{first}` "
            f"is filled in by `find_executable_batch_size`. Leave it out: pass what follows it only."
        ) from None
