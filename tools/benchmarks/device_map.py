"""P15: a device map of a model of 1,280 layers, two of them devices' worth of memory and the rest for the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import Side

__all__ = ["block", "comparisons"]

NUM_LAYERS = 1280
_MODULE_OF = {"accel": "accel_bigmodel.placing", "accelerate": "accelerate"}


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """accelerate fills greedily and has the same function; the others have none."""
    having = {name: side for name, side in sides.items() if name in _MODULE_OF}
    titles = {
        "layers": f"device map of {NUM_LAYERS:,} linear layers",
        "blocks": f"device map of {NUM_LAYERS:,} blocks of 8 modules",
    }
    return [
        Comparison(
            key="P15",
            title=title,
            reference=None,
            by="time",
            goal=0.1,
            samplers={name: workers(side, "device_map", variant) for name, side in having.items()},
        )
        for variant, title in titles.items()
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """One map, from the model to the dictionary."""
    import torch

    infer = import_module(_MODULE_OF[side]).infer_auto_device_map
    with torch.device("meta"):
        model = _model(variant)
    total = sum(each.numel() * each.element_size() for each in model.parameters())
    memory: dict[int | str, int] = {0: total // 3, 1: total // 3, "cpu": total}

    def measure() -> float:
        start = time.perf_counter()
        infer(model, max_memory=dict(memory), no_split_module_classes=["TransformerBlock"])
        return time.perf_counter() - start

    return measure


def _model(variant: str) -> Any:
    from torch import nn

    class TransformerBlock(nn.Module):
        """Without a forward that anybody calls: only its sizes count."""

        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
            self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            raise NotImplementedError

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(1000, 64)
            self.layers = nn.ModuleList(TransformerBlock() for _ in range(NUM_LAYERS))
            self.head = nn.Linear(64, 1000)

    if variant == "blocks":
        return Blocks()
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(NUM_LAYERS)))
    layers._no_split_modules = ["TransformerBlock"]  # so that naming a class that it lacks is no mistake
    return layers
