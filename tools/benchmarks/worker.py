"""A process that measures on demand: ``python -m benchmarks.worker MODULE SIDE VARIANT``.

For each line that it reads it runs one block and writes its seconds on a line. What libraries print goes to stderr.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from statistics import median

__all__ = ["main", "median_of"]


def main(module: str, side: str, variant: str) -> None:
    """Serve until the other end closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    block = import_module(f"benchmarks.{module}").block(side, variant)
    gc.collect()
    gc.freeze()
    for _ in sys.stdin:
        answers.write(f"{block()!r}\n")


def median_of(step: Callable[[], object], *, warm_up: int, times: int) -> Callable[[], float]:
    """A block of `times` steps, each timed alone: the median is not moved by what else the machine does."""

    def block() -> float:
        for _ in range(warm_up):
            step()
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    return block


if __name__ == "__main__":
    main(*sys.argv[1:])
