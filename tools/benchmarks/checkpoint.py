"""P5 and P6: saving and loading a model and its AdamW, of 400 MB, on the CPU of one process."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import PACKAGE_OF, Side

__all__ = ["block", "comparisons"]

WIDTH, DEPTH = 2048, 8
"""Weights of 134 MB, and a state of AdamW of twice that."""
KEPT = 2
"""Checkpoints that lie on the disk at once."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Against accelerate; without it, the time alone."""
    having = {name: side for name, side in sides.items() if name in ("accel", "accelerate", "fabric")}
    against_peer = "accelerate" in having
    rows = (
        ("P5", "stall", "stall of a save of 400 MB (accel: in the background)", 0.1, 0.5),
        ("P5", "save", "a save of 400 MB that blocks, until it can be read", 1.0, 2.0),
        ("P5", "durable", "a save of 400 MB that blocks, until it is on the disk", 1.0, 4.0),
        ("P6", "load", "loading 400 MB (accel: after proving every byte)", 1.0, 2.0),
    )
    return [
        Comparison(
            key=key,
            title=title,
            reference="accelerate" if against_peer else None,
            by="ratio" if against_peer else "time",
            goal=ratio if against_peer else seconds,
            samplers={name: workers(side, "checkpoint", variant) for name, side in having.items()},
        )
        for key, variant, title, ratio, seconds in rows
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """Save into a fresh folder, or load what was saved once."""
    import torch

    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])
    optimizer = torch.optim.AdamW(model.parameters())
    run = (_Fabric if side == "fabric" else _Accelerator)(side, model, optimizer, folder, variant)
    run.step()
    if variant == "load":
        run.save(folder / "it")
    count = 0

    def measured() -> float:
        nonlocal count
        count += 1
        target = folder / ("it" if variant == "load" else str(count))
        run.step()
        start = time.perf_counter()
        if variant == "load":
            run.load(target)
        else:
            run.save(target)
        took = time.perf_counter() - start
        run.settle()
        shutil.rmtree(folder / str(count - KEPT), ignore_errors=True)
        return took

    return measured


class _Accelerator:
    """accel and accelerate, whose calls have the same names."""

    def __init__(self, side: str, model: Any, optimizer: Any, folder: Path, variant: str) -> None:
        library = import_module(PACKAGE_OF[side])
        self.ours = side == "accel"
        self.variant = variant
        more: dict[str, Any] = {}
        if self.ours:
            more["project_config"] = library.ProjectConfiguration(sync_to_disk=variant != "save")
        self.accelerator = library.Accelerator(cpu=True, **more)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.pending: Any = None

    def step(self) -> None:
        import torch

        self.accelerator.backward(self.model(torch.randn(2, WIDTH)).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        if self.ours and self.variant == "stall":
            self.pending = self.accelerator.save_state(folder, blocking=False)
            return
        self.accelerator.save_state(str(folder))
        if not self.ours and self.variant == "durable":
            _flush(folder)

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))

    def settle(self) -> None:
        if self.pending is not None:
            self.pending.wait()


class _Fabric:
    """Lightning Fabric, whose user names what is saved."""

    def __init__(self, side: str, model: Any, optimizer: Any, folder: Path, variant: str) -> None:
        self.fabric = import_module(PACKAGE_OF[side]).Fabric(accelerator="cpu")
        self.fabric.launch()
        self.variant = variant
        self.model, self.optimizer = self.fabric.setup(model, optimizer)

    def step(self) -> None:
        import torch

        self.fabric.backward(self.model(torch.randn(2, WIDTH)).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        folder.mkdir()
        self.fabric.save(folder / "state.ckpt", {"model": self.model, "optimizer": self.optimizer})
        if self.variant == "durable":
            _flush(folder)

    def load(self, folder: Path) -> None:
        self.fabric.load(folder / "state.ckpt", {"model": self.model, "optimizer": self.optimizer})

    def settle(self) -> None: ...


def _flush(folder: Path) -> None:
    """What would make it durable, which these libraries leave to the system."""
    for each in [*folder.iterdir(), folder]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
