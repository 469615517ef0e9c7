"""P12 and P13: from the command line to a script, and back."""

from __future__ import annotations

from pathlib import Path

from benchmarks.compare import Comparison
from benchmarks.processes import Opener, command
from benchmarks.sides import Side

__all__ = ["comparisons"]

SCRIPTS = Path(__file__).resolve().parent / "scripts"
COMMAND = {"accel": ["-m", "accel_launch"], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}
ACCELERATE_TWO = (
    *("launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
"""Two processes of a script that uses no GPU: with ``--cpu`` it would start one, whatever number it is given."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """One process, the help, and two processes. Fabric's command is measured where it has a like."""
    nothing, world = str(SCRIPTS / "nothing.py"), str(SCRIPTS / "world.py")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]

    def samplers(*words: str, reference: list[str]) -> dict[str, Opener]:
        return {
            "reference": command(sides["torch"], reference),
            **{name: command(sides[name], [*COMMAND[name], *words]) for name in COMMAND if name in sides},
        }

    def samplers_of_two(script: str) -> dict[str, Opener]:
        opened = {
            "reference": command(sides["torch"], [*torchrun, script]),
            "accel": command(sides["accel"], [*COMMAND["accel"], "launch", "--cpu", "--num-processes", "2", script]),
        }
        if "accelerate" in sides:
            opened["accelerate"] = command(sides["accelerate"], [*COMMAND["accelerate"], *ACCELERATE_TWO, script])
        return opened

    return [
        Comparison(
            key="P12",
            title="`launch` of one process that does nothing (reference: python)",
            reference=None,
            by="time",
            goal=0.2,
            starts_anew=True,
            samplers=samplers("launch", "--cpu", nothing, reference=[nothing]),
        ),
        Comparison(
            key="P12",
            title="the command's `--help` (reference: python)",
            reference=None,
            by="time",
            goal=0.15,
            starts_anew=True,
            samplers=samplers("--help", reference=[nothing]),
        ),
        Comparison(
            key="P13",
            title="`launch` of two processes that do nothing (reference: torchrun)",
            reference="reference",
            by="ratio",
            goal=1.05,
            starts_anew=True,
            samplers=samplers_of_two(nothing),
        ),
        Comparison(
            key="P13",
            title="`launch` of two that import torch and meet over gloo (reference: torchrun)",
            reference="reference",
            by="ratio",
            goal=1.05,
            starts_anew=True,
            samplers=samplers_of_two(world),
        ),
    ]
