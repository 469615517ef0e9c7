"""P1, P2 and P4: a forward whose weights lie in host memory or on disk.

Where there is a GPU the weights take 8.6 GB in bfloat16, and 4.6 GB on disk; on the CPU they take 1 GB on disk, in
float32, whose products of few rows are the fastest there. What the weights are multiplied with is a single row, so a
forward takes what bringing them takes. torch's side copies as many pinned bytes to the device, which is the limit.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import Side

__all__ = ["block", "comparisons"]

WIDTH = 4096
LAYERS_OF_A_BLOCK = 8
"""268 MB in bfloat16."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """On a GPU against the limit of the bus; on the CPU against accelerate, without it the time alone."""
    import torch

    having = {name: side for name, side in sides.items() if name in ("accel", "accelerate", "torch")}
    if torch.cuda.is_available():
        rows = (
            ("P1", "host", "a forward with 8.6 GB in host memory (torch: pinned copies of as much)", 55.2 / 50),
            ("P2", "half", "a forward with half of 8.6 GB in host memory (torch: copies of that half)", 55.2 / 50),
            ("P4", "disk", "a forward with 4.6 GB on disk, in page cache (torch: pinned copies of as much)", 55.2 / 30),
        )
        reference: str | None = "torch"
    else:
        rows = (("P4", "disk", "a forward with 1 GB on disk, in page cache, on the CPU", 1 / 3),)
        having.pop("torch", None)
        reference = "accelerate" if "accelerate" in having else None
    return [
        Comparison(
            key=key,
            title=title,
            reference=reference,
            by="time" if reference is None else "ratio",
            goal=1.0 if reference is None else ratio,
            samplers={name: workers(side, "offload", variant) for name, side in having.items()},
        )
        for key, variant, title, ratio in rows
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """One forward, until its result is there."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    num_blocks = (17 if variant == "disk" else 32) if on_gpu else 2
    if side == "torch":
        return _pinned_copies(num_blocks // (2 if variant == "half" else 1), device)
    folder = Path(tempfile.mkdtemp(prefix="offload-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make = _with_accel if side == "accel" else _with_accelerate
    model = make(_model(num_blocks, dtype), variant, device, folder)
    row = torch.randn(1, WIDTH, dtype=dtype, device=device)

    def measured() -> float:
        with torch.no_grad():
            start = time.perf_counter()
            model(row).cpu()
            return time.perf_counter() - start

    return measured


def _model(num_blocks: int, dtype: Any) -> Any:
    import torch

    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
    with torch.device("meta"):
        blocks = [
            torch.nn.Sequential(
                *(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS_OF_A_BLOCK))
            )
            for _ in range(num_blocks)
        ]
    model = torch.nn.Sequential(*blocks)
    for each in model.modules():
        if isinstance(each, torch.nn.Linear):
            each.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return model


def _with_accel(model: Any, variant: str, device: Any, folder: Path) -> Any:

    from accel_bigmodel.dispatch import dispatch_model
    from accel_bigmodel.offload.offloading import cpu_offload, disk_offload
    from accel_bigmodel.stored import read_index
    from accel_bigmodel.testing import save_file

    if variant == "disk":  # in a file already, as downloaded models are
        save_file(model.state_dict(), folder / "model.safetensors")
        return disk_offload(model.to("meta"), folder, device, offload_index=read_index(folder))
    if variant == "half":
        return dispatch_model(model, _half(model))
    return cpu_offload(model, device)


def _with_accelerate(model: Any, variant: str, device: Any, folder: Path) -> Any:
    import accelerate

    if variant == "disk":
        return accelerate.disk_offload(model, str(folder), device)
    if variant == "half":
        return accelerate.dispatch_model(model, _half(model))
    return accelerate.cpu_offload(model, device)


def _half(model: Any) -> dict[str, Any]:
    """Every second block on the device: those between are on their way while it computes."""
    return {str(number): "cpu" if number % 2 else 0 for number in range(len(model))}


def _pinned_copies(num_blocks: int, device: Any) -> Callable[[], float]:
    import torch

    num_bytes = 2 * WIDTH * WIDTH * LAYERS_OF_A_BLOCK
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def measured() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_blocks):
            target.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return measured
