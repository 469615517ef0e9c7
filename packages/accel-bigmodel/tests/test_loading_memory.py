"""How much memory loading takes besides what is loaded, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading import ReadSettings, load_checkpoint_in_model
from accel_bigmodel.testing import save_file
from accel_state.testing import run_ranks

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux's /proc")

WIDTH, LAYERS = 2048, 8
TENSOR_BYTES = WIDTH * WIDTH * 4
MODEL_BYTES = LAYERS * TENSOR_BYTES
READING = ReadSettings(num_threads=2, chunk_bytes=1 << 20)
LARGE = ReadSettings(num_threads=2, chunk_bytes=1 << 20, large_pages=True)
STAGING_BYTES = 2 * 2 * READING.chunk_bytes
SLACK_BYTES = 6 << 20
"""Stacks and arenas of threads, modules imported on the way, pages at both ends."""


class Peak:
    """The most memory that this process had to itself while it was inside, files that are mapped left out."""

    def __enter__(self) -> Peak:
        gc.collect()
        libc = ctypes.CDLL(None)
        getattr(libc, "malloc_trim", abs)(0)  # what is free would be used again unseen
        # M_MMAP_THRESHOLD (mallopt(3)). Left alone it grows to 32 MB, and glibc keeps freed tensors that stay below it.
        getattr(libc, "mallopt", max)(-3, 1 << 20)
        self.before = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, resident())
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, resident())
        self._stop.set()
        self._thread.join()


def resident() -> int:
    """Bytes of memory that is no file's."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) << 10


def make() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def load(path: str, full: bool, arguments: dict[str, Any]) -> tuple[int, float]:
    """On a process of its own: memory besides what was there, and the sum of what was loaded."""
    with init_empty_weights():
        small = nn.Linear(1, 1)
    save_file({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, f"{path}.warm")
    load_checkpoint_in_model(small, f"{path}.warm", reading=READING)  # imports, and the first thread's arena
    model: Any = None
    if full:
        model = make()
    else:
        with init_empty_weights():
            model = make()
    with Peak() as memory:
        load_checkpoint_in_model(model, path, **{"reading": READING, **arguments})
    total = sum(each.double().sum().item() for each in model.parameters() if not each.is_meta)
    return memory.peak - memory.before, total


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("large")
    tensors = {f"{number}.weight": torch.randn(WIDTH, WIDTH) for number in range(LAYERS)}
    save_file(tensors, folder / "x.safetensors")
    torch.save(tensors, folder / "x.bin")
    return folder, sum(each.double().sum().item() for each in tensors.values())


def on_disk(folder: Path) -> dict[str, Any]:
    return {"device_map": {"": "disk"}, "offload_folder": str(folder / "offload"), "dtype": "bf16"}


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
@pytest.mark.parametrize(
    ("full", "arguments", "expected_bytes"),
    [
        pytest.param(False, lambda _: {}, MODEL_BYTES, id="as stored"),
        pytest.param(False, lambda _: {"dtype": "bf16"}, MODEL_BYTES // 2, id="converted"),
        pytest.param(True, lambda _: {}, 0, id="in place"),
        pytest.param(False, lambda _: {"reading": LARGE}, MODEL_BYTES, id="in large pages"),
        pytest.param(False, lambda _: {"mmap": True}, 0, id="mapped"),
        pytest.param(False, on_disk, 0, id="converted on disk"),
        pytest.param(True, lambda _: {"dtype": "float64"}, MODEL_BYTES, id="larger, the old let go of"),
    ],
)
def test_loading_needs_nothing_but_the_model_and_its_staging(
    files: tuple[Path, float],
    name: str,
    full: bool,
    arguments: Callable[[Path], dict[str, Any]],
    expected_bytes: int,
) -> None:
    folder, expected = files
    ((extra, total),) = run_ranks(load, 1, str(folder / name), full, arguments(folder), open_process=False)
    assert extra <= expected_bytes + STAGING_BYTES + SLACK_BYTES
    assert extra >= expected_bytes - SLACK_BYTES
    if "device_map" not in arguments(folder):
        assert total == pytest.approx(expected, abs=20)
