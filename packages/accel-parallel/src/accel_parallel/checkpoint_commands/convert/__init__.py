"""`accel checkpoint convert`: checkpoints of accelerate and of torch.distributed.checkpoint, read.

====================  ==========================================================
`accelerate_layout`   folders of accelerate's `save_state`
`dcp_layout`          folders of torch.distributed.checkpoint
`distributed`         their tensors, put together part by part
`opcodes`             their description, read as data
`foreign`             files of `torch.save`, read with `weights_only`
`weights`             weights in files
`optimizer`           an optimizer's state, keyed by name
`optimizers`          all of them, as items
`found`               what was asked for, and found
====================  ==========================================================
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accel_parallel.checkpoint.location import Location, as_location
from accel_parallel.checkpoint.manifest import MANIFEST_NAME
from accel_parallel.checkpoint.staging import folder_of
from accel_parallel.checkpoint_commands.arguments import Arguments, whole_number
from accel_parallel.checkpoint_commands.progress import bytes_bar
from accel_parallel.checkpoint_commands.text import size_text
from accel_state.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from accel_parallel.checkpoint_commands.convert.found import Asked, Found

__all__ = ["main"]

_NOTES = """\
Reads what `save_state` of accelerate or `torch.distributed.checkpoint.save` wrote, and writes a checkpoint for
`load_state`. Pickles are read as tensors and plain values only (`weights_only=True`), never run: what needs more is
left out, by name, or refused. Tensors are copied one at a time.

Left out always: places in the data. Give `load_state(..., strict=False)` what then lacks them.

An optimizer of accelerate numbers its parameters and names none. Where shapes and the model's file leave one way to
name them, it is taken and said; otherwise give the names, a JSON list written where the optimizer is made:
  names = {p: n for n, p in model.named_parameters()}
  json.dump([names[p] for g in optimizer.param_groups for p in g["params"]], open("names.json", "w"))

examples
  accel checkpoint convert old/checkpoint_7 runs/7b/checkpoints/checkpoint_0
  accel checkpoint convert old/checkpoint_7 new --parameter-names names.json --tie lm_head.weight=embed.weight
  accel checkpoint convert dcp/step-100 new --from dcp --model-key net --step 100"""


def main(argv: Sequence[str]) -> int:
    """Read it, and write ours."""
    arguments = Arguments("convert", notes=_NOTES)
    arguments.add_argument("source", metavar="SOURCE", help="folder to read")
    arguments.add_argument("output", metavar="OUTPUT", help="folder to write, made if missing")
    arguments.add_argument(
        "--from", dest="layout", choices=("auto", "accelerate", "dcp"), default="auto", help="what SOURCE is"
    )
    arguments.add_argument("--parameter-names", metavar="FILE", help="names by position in the optimizer, as JSON")
    arguments.add_argument(
        "--tie", action="append", default=[], type=_tie, metavar="NAME=OTHER", help="NAME is OTHER, which is there"
    )
    arguments.add_argument("--model-key", metavar="KEY", help="dcp: where the model is, by default `model`")
    arguments.add_argument("--optimizer-key", metavar="KEY", help="dcp: likewise, by default `optimizer`")
    arguments.add_argument("--step", type=whole_number(0), metavar="N", help="optimizer steps, if it says none")
    arguments.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    options = arguments.read(argv)
    if options is None:
        return 0
    source, output = Path(options.source), as_location(options.output)
    layout = _layout(source) if options.layout == "auto" else options.layout
    _refuse_settings(options, layout)
    _refuse_output(source, output, force=options.force)
    found = _read(source, layout, _asked(options))
    _write(output, found, options.step)
    _report(output, found)
    return 0


def _tie(text: str) -> tuple[str, str]:
    name, _, other = text.partition("=")
    if not name or not other:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of names, written as NAME=OTHER")
    return name, other


def _layout(source: Path) -> str:
    if not source.is_dir():
        raise CheckpointError(f"`{source}` is no folder, so there is nothing to convert. Check how it is written.")
    if (source / MANIFEST_NAME).is_file():
        raise CheckpointError(f"`{source}` is a checkpoint of ours already. Give it to `load_state`.")
    return "dcp" if (source / ".metadata").is_file() else "accelerate"


def _refuse_settings(options: argparse.Namespace, layout: str) -> None:
    for name in ("model_key", "optimizer_key"):
        if layout == "accelerate" and getattr(options, name) is not None:
            raise ConfigError(
                f"`--{name.replace('_', '-')}` is for folders of torch.distributed.checkpoint, and `{options.source}` "
                f"is accelerate's. Leave it out."
            )


def _refuse_output(source: Path, output: Location, *, force: bool) -> None:
    if isinstance(output, Path) and source.resolve() == output.resolve():
        raise ConfigError(f"`{output}` is what is to be read. Name another folder to write.")
    if folder_of(output).holds(MANIFEST_NAME) and not force:
        raise ConfigError(f"`{output}` holds a checkpoint, which would be replaced. Name another, or give `--force`.")


def _asked(options: argparse.Namespace) -> Asked:
    from accel_parallel.checkpoint_commands.convert.found import Asked

    names = None
    if options.parameter_names is not None:
        try:
            names = json.loads(Path(options.parameter_names).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"`{options.parameter_names}` is no JSON ({error}). Write a list of names.") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"`{options.parameter_names}` is no list of names. Write one, as `--help` shows.")
    return Asked(
        parameter_names=None if names is None else tuple(names),
        ties=tuple(options.tie),
        model_key=options.model_key,
        optimizer_key=options.optimizer_key,
    )


def _read(source: Path, layout: str, asked: Asked) -> Found:
    if layout == "dcp":
        from accel_parallel.checkpoint_commands.convert.dcp_layout import read_dcp

        return read_dcp(source, asked)

    from accel_parallel.checkpoint_commands.convert.accelerate_layout import read_accelerate

    return read_accelerate(source, asked)


def _write(output: Location, found: Found, step: int | None) -> None:
    from accel_parallel.checkpoint import About, write_checkpoint
    from accel_parallel.checkpoint.item import flatten

    if step is not None:
        for item in found.items:
            if item.kind == "optimizer":
                item.state["steps_taken"] = step
        found.step = step
    elif found.step is None:
        found.notes.append("no optimizer says how many steps it has taken, so 0 is written; `--step N` says it")
    # Taken apart once more than needed, so that the bar knows its end; no tensor is read for it.
    total = sum(shape.nbytes for item in found.items for shape in flatten(item).shapes.values())
    about = About(step=found.step or 0, strategy=f"converted from {found.source}", world_size=found.world_size)
    with bytes_bar(total, "convert") as advance:
        write_checkpoint(str(output), found.items, about=about, progress=advance)


def _report(output: Location, found: Found) -> None:
    from accel_parallel.checkpoint import Checkpoint

    manifest = Checkpoint(output).manifest
    size = sum(each.size_bytes for each in manifest.files.values())
    print(f"{output}: step {manifest.step:,}, {', '.join(manifest.items)}, {size_text(size)}")
    for note in found.notes:
        print(f"  note: {note}.")
    for left in found.left_out:
        print(f"  left out: {left.rstrip('.')}.")
