"""`accel checkpoint diff`: two checkpoints compared, tensor by tensor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from accel_parallel.checkpoint_commands.arguments import Arguments
from accel_parallel.checkpoint_commands.places import find_checkpoint
from accel_parallel.checkpoint_commands.progress import bytes_bar
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    from accel_parallel.checkpoint.store import Checkpoint

__all__ = ["main"]

_SHOWN = 20
"""Lines of an item, unless all are asked for."""
_NOTES = """\
Items whose files have the same checksums are the same and are not read. Of the others, tensors are read a piece at a
time: neither checkpoint has to fit into memory. NaN equals NaN. Values beyond a tolerance differ: |a - b| > atol +
rtol * |b|; both are 0 by default, for tensors and for numbers beside them.

Exit code 0: the same. 1: something differs. World size, strategy and versions are shown and count for nothing.

examples
  accel checkpoint diff runs/a runs/b                        the latest of each
  accel checkpoint diff runs/a/checkpoints/checkpoint_3 runs/a/checkpoints/checkpoint_4 --item model
  accel checkpoint diff gpu cpu --item model --rtol 1e-5 --atol 1e-8"""


def main(argv: Sequence[str]) -> int:
    """Compare them."""
    arguments = Arguments("diff", notes=_NOTES)
    arguments.add_argument("a", metavar="A", help="folder of a checkpoint, or of a run for its latest")
    arguments.add_argument("b", metavar="B", help="the other")
    arguments.add_argument("--item", metavar="NAME", help="one item only, such as model")
    arguments.add_argument("--rtol", type=_tolerance, default=0.0, metavar="X", help="relative tolerance")
    arguments.add_argument("--atol", type=_tolerance, default=0.0, metavar="X", help="absolute tolerance")
    arguments.add_argument("--all", action="store_true", help=f"every difference, not the first {_SHOWN} of an item")
    options = arguments.read(argv)
    if options is None:
        return 0
    folders = find_checkpoint(options.a), find_checkpoint(options.b)

    from accel_parallel.checkpoint.store import Checkpoint

    a, b = Checkpoint(folders[0]), Checkpoint(folders[1])
    for line in _heads(a, b):
        print(line)
    same = True
    for name in _names(a, b, options.item):
        lines = _compare(a, b, name, options)
        shown = lines if options.all else lines[:_SHOWN]
        print(f"{name}: {'differs' if lines else 'the same'}", *shown, sep="\n  ")
        if len(shown) < len(lines):
            print(f"  ... and {len(lines) - len(shown)} more; `--all` shows them")
        same = same and not lines
    return 0 if same else 1


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no tolerance, which is 0 or more")
    return value


def _names(a: Checkpoint, b: Checkpoint, item: str | None) -> list[str]:
    names = [*a.items, *(name for name in b.items if name not in a.items)]
    if item is None:
        return names
    if item not in names:
        raise ConfigError(f"`--item {item}` is in neither checkpoint. They hold {', '.join(names)}.")
    return [item]


def _heads(a: Checkpoint, b: Checkpoint) -> list[str]:
    lines = [f"{mark}: {each.folder.location}, step {each.manifest.step:,}" for mark, each in (("A", a), ("B", b))]
    for what in ("world_size", "mesh", "strategy", "libraries"):
        ours, theirs = getattr(a.manifest, what), getattr(b.manifest, what)
        if ours != theirs:
            lines.append(f"{what}: {ours} in A, {theirs} in B")
    return lines


def _compare(a: Checkpoint, b: Checkpoint, name: str, options: argparse.Namespace) -> list[str]:
    for mark, other, each in (("A", "B", b), ("B", "A", a)):
        if name not in each.items:
            return [f"only in {mark}, not in {other}"]
    if _same_files(a, b, name):
        return []

    from accel_parallel.checkpoint_commands.comparison import Tolerance, compare_states, compare_tensors

    tolerance = Tolerance(options.rtol, options.atol)
    total = sum(each.nbytes for each in a.tensors(name).values())
    with bytes_bar(total, name) as step:
        lines = compare_tensors(a.tensors(name), b.tensors(name), tolerance, step)
    ours, theirs = (each.read(name, lazy=True, verify=False) for each in (a, b))
    return lines + list(compare_states(ours, theirs, tolerance))


def _same_files(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    ours, theirs = ({file: each.manifest.files[file] for file in each.items[name].files} for each in (a, b))
    return ours == theirs and a.items[name].aliases == b.items[name].aliases
