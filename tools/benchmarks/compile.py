"""Compile: how long the first training step of a deep model takes, during which it is compiled.

Every sample is a fresh process with an empty cache directory of its own, so nothing of the model was compiled before.
What inductor does once, whatever the model (importing itself, trying which instructions the processor has), is done
before on one small function and not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from benchmarks.compare import Comparison, Sampler
from benchmarks.sides import Side

__all__ = ["comparisons", "measured"]

DEPTH, WIDTH, HEADS, LENGTH = 24, 64, 4, 32
LIMIT_S = 900
"""Longest that a sample may take."""
_WAYS = {"torch": "whole", "accel": "regions", "accelerate": "peer"}
"""How each side compiles: the model as a whole, or by its blocks."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """The first step by blocks and, as the reference, as a whole."""
    return [
        Comparison(
            key="Compile",
            title=f"first step of {DEPTH} blocks, compiled by blocks (reference: as a whole)",
            reference="torch",
            by="ratio",
            goal=0.25,
            starts_anew=True,
            samplers={name: partial(_cold, sides[name], way) for name, way in _WAYS.items() if name in sides},
        )
    ]


@contextmanager
def _cold(side: Side, way: str) -> Iterator[Sampler]:
    def sample() -> float:
        with tempfile.TemporaryDirectory(prefix="compile-") as folder:
            done = subprocess.run(
                [side.python, "-c", f"from benchmarks.compile import measured; print(*measured({way!r}))"],
                env=side.environment(TORCHINDUCTOR_CACHE_DIR=folder, TORCHINDUCTOR_FX_GRAPH_CACHE="0"),
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                stdin=subprocess.DEVNULL,
            )
        if done.returncode:
            raise RuntimeError(f"{way} ended with {done.returncode}: {done.stderr[-500:]}")
        return float(done.stdout.split()[-2])

    yield sample


def measured(way: str) -> tuple[float, float]:
    """Seconds of the first step and the median of later ones, in this process; `way` is ``eager`` or of `_WAYS`."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    small: Any = torch.compile(torch.nn.functional.silu)(torch.ones(WIDTH, requires_grad=True))
    small.sum().backward()
    model = _ways()[way](_model())
    tokens = torch.randint(100, (4, LENGTH))

    def step() -> float:
        start = time.perf_counter()
        loss: Any = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return time.perf_counter() - start

    first = step()
    return first, statistics.median(step() for _ in range(20))


def _ways() -> dict[str, Callable[[Any], Any]]:
    import torch

    def regions(model: Any) -> Any:
        from accel_parallel.compilation import compile_regions

        compile_regions(model)
        return model

    def peer(model: Any) -> Any:
        return import_module("accelerate.utils").compile_regions(model)

    return {"eager": lambda model: model, "whole": torch.compile, "regions": regions, "peer": peer}


def _model() -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            batch, length, width = hidden.shape
            split = self.qkv(self.before(hidden)).view(batch, length, 3, HEADS, width // HEADS)
            queries, keys, values = split.permute(2, 0, 3, 1, 4)  # three of (batch, heads, length, width of a head)
            mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
            hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
            result: torch.Tensor = hidden + self.down(nn.functional.gelu(self.up(self.after(hidden))))
            return result

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, WIDTH)
            self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 100)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(tokens)
            for block in self.blocks:
                hidden = block(hidden)
            result: torch.Tensor = self.head(self.norm(hidden))
            return result

    return Model()
