"""Out of memory, simulated."""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import pytest
import torch

from accel_state import (
    ConfigError,
    Process,
    ProcessSettings,
    clear_device_cache,
    find_executable_batch_size,
    is_out_of_memory,
    release_memory,
)
from accel_state.errors import BatchSizeError


def needs(limit: int, tried: list[int]) -> Any:
    def train(batch_size: int, model: str = "m", *, epochs: int = 1) -> tuple[int, str, int]:
        """Train."""
        tried.append(batch_size)
        if batch_size > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        return batch_size, model, epochs

    return train


def test_the_search_ends_at_a_size_that_fits_and_remembers_it() -> None:
    tried: list[int] = []
    train = find_executable_batch_size(starting_batch_size=100)(needs(75, tried))
    assert train("a", epochs=2) == (72, "a", 2)
    assert tried == [100, 90, 81, 72]
    assert train("b") == (72, "b", 1)
    assert tried[4:] == [72]
    assert train.__doc__ == "Train."


def test_small_sizes_go_down_by_one() -> None:
    tried: list[int] = []
    assert find_executable_batch_size(needs(1, tried), starting_batch_size=3)()[0] == 1
    assert tried == [3, 2, 1]


def test_no_size_fits() -> None:
    halve = find_executable_batch_size(
        needs(0, []), starting_batch_size=8, reduce=lambda size: size // 2, min_batch_size=2
    )
    with pytest.raises(BatchSizeError, match=r"tried: 8, 4, 2 \(`min_batch_size=2`\).*20 GiB") as caught:
        halve()
    assert caught.value.tried == (8, 4, 2)
    assert "CUDA out of memory" in str(caught.value.__cause__)


def test_other_errors_pass_at_once() -> None:
    tried: list[int] = []

    def broken(batch_size: int) -> None:
        tried.append(batch_size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_executable_batch_size(broken)()
    assert tried == [128]


@pytest.mark.parametrize("reduce", [lambda size: size, lambda size: size + 1, lambda size: size / 2])
def test_a_search_that_would_not_end_is_refused(reduce: Any) -> None:
    with pytest.raises(ConfigError, match="after batch size 128, which is not a smaller whole number"):
        find_executable_batch_size(needs(0, []), reduce=reduce)()


def test_passing_the_batch_size_is_refused() -> None:
    train = find_executable_batch_size(needs(128, []))
    with pytest.raises(ConfigError, match=r"`batch_size` is filled in by `find_executable_batch_size`"):
        train(32, "model")
    with pytest.raises(ConfigError, match="Leave it out"):
        train(batch_size=32)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"starting_batch_size": 0}, "`starting_batch_size=0` is not a number of samples"),
        ({"min_batch_size": True}, "`min_batch_size=True` is not a number of samples"),
        ({"starting_batch_size": 4, "min_batch_size": 8}, "is more than `starting_batch_size=4`"),
    ],
)
def test_sizes_that_make_no_sense(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        find_executable_batch_size(**arguments)


def test_a_function_without_arguments() -> None:
    with pytest.raises(ConfigError, match="takes no argument"):
        find_executable_batch_size(lambda: None)


def test_a_failed_attempt_is_let_go_before_the_next() -> None:
    class Big: ...

    alive: list[weakref.ref[Big]] = []

    def train(batch_size: int) -> int:
        assert not any(each() for each in alive), "the last attempt still holds its memory"
        big = Big()
        alive.append(weakref.ref(big))
        if batch_size > 2:
            raise torch.OutOfMemoryError("full")
        return batch_size

    assert find_executable_batch_size(train, starting_batch_size=4)() == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("XPU out of memory. Tried to allocate"),
        RuntimeError("NPU out of memory. Tried to allocate"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    ],
)
def test_out_of_memory_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_allocator_of_this_machine_is_recognised() -> None:
    with pytest.raises(RuntimeError, match="allocate") as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_release_memory() -> None:
    class Model: ...

    model, other = Model(), Model()
    gone = weakref.ref(model)
    model, other = release_memory(model, other)  # type: ignore[assignment]
    gc.collect()
    assert model is None
    assert other is None
    assert gone() is None
    assert release_memory() == []


def test_the_device_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    fake = types.SimpleNamespace(is_available=lambda: True, empty_cache=lambda: emptied.append("xpu"))
    monkeypatch.setattr(torch, "xpu", fake)
    clear_device_cache()
    assert emptied == ["xpu"]
    with Process.open(ProcessSettings(device="cpu")):
        clear_device_cache(garbage_collection=True)
    assert emptied == ["xpu"]
