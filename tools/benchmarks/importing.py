"""P14: what an import costs a script that imports torch anyway."""

from __future__ import annotations

from benchmarks.compare import Comparison
from benchmarks.processes import printed
from benchmarks.sides import Side

__all__ = ["comparisons"]

LEAVES = ("state", "data", "parallel", "precision", "bigmodel", "track", "launch")

_TIMED = """
import torch, time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""
_TORCH = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
_CLASS = {
    "accel": "from accel import Accelerator",
    "accelerate": "from accelerate import Accelerator",
    "fabric": "from lightning_fabric import Fabric",
}


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """The one class, and every public name of each leaf."""
    classes = {
        name: printed(sides[name], _TIMED.format(statement=statement))
        for name, statement in _CLASS.items()
        if name in sides
    }
    found = [
        Comparison(
            key="P14",
            title="importing the class users meet, after torch (reference: torch itself)",
            reference=None,
            by="time",
            goal=0.03,
            starts_anew=True,
            samplers={"reference": printed(sides["torch"], _TORCH), **classes},
        )
    ]
    for leaf in LEAVES:
        name = f"accel_{leaf}"
        every = f"import {name}\nfor each in {name}.__all__: getattr({name}, each)"
        found.append(
            Comparison(
                key="P14",
                title=f"every public name of accel-{leaf}, after torch",
                reference=None,
                by="time",
                goal=0.03,
                starts_anew=True,
                samplers={"accel": printed(sides["accel"], _TIMED.format(statement=every))},
            )
        )
    return found
