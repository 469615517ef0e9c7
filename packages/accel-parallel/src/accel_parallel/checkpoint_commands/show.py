"""`accel checkpoint show`: what is in a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from accel_parallel.checkpoint.manifest import Manifest
from accel_parallel.checkpoint_commands.arguments import Arguments
from accel_parallel.checkpoint_commands.places import find_checkpoint
from accel_parallel.checkpoint_commands.text import size_text, table
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["main"]

_NOTES = """\
Says what the manifest says. Tensors come from the headers of their files; no values are read, and nothing is proved.

examples
  accel checkpoint show runs/7b                      the latest one of a run
  accel checkpoint show runs/7b/checkpoints/checkpoint_3 --item optimizer
  accel checkpoint show runs/7b --tensors --json"""


def main(argv: Sequence[str]) -> int:
    """Show it."""
    arguments = Arguments("show", notes=_NOTES)
    arguments.add_argument("checkpoint", metavar="CHECKPOINT", help="its folder, or a run's for the latest one")
    arguments.add_argument("--item", metavar="NAME", help="one item only, with its files and tensors")
    arguments.add_argument("--tensors", action="store_true", help="tensors of all items")
    arguments.add_argument("--json", action="store_true", help="one object, for programs")
    options = arguments.read(argv)
    if options is None:
        return 0
    folder = find_checkpoint(options.checkpoint)
    manifest = Manifest.read(folder)
    names = [options.item] if options.item else list(manifest.items)
    if options.item and options.item not in manifest.items:
        raise ConfigError(
            f"`--item {options.item}` is not in `{folder.location}`.{did_you_mean(options.item, list(manifest.items))} "
            f"It holds {', '.join(manifest.items)}."
        )
    data = _data(folder.location, manifest, names)
    if options.item or options.tensors:
        _add_tensors(data, folder)
    print(json.dumps(data, indent=1) if options.json else "\n".join(_lines(data, bool(options.item))))
    return 0


def _data(location: str, manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """As `--json` prints it."""
    return {
        "path": location,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "mesh": dict(manifest.mesh),
        "strategy": manifest.strategy,
        "libraries": dict(manifest.libraries),
        "format_version": manifest.version,
        "size_bytes": sum(each.size_bytes for each in manifest.files.values()),
        "num_files": len(manifest.files),
        "items": {
            name: {
                "kind": manifest.items[name].kind,
                "size_bytes": sum(manifest.files[file].size_bytes for file in manifest.items[name].files),
                "files": {
                    file: {
                        "size_bytes": manifest.files[file].size_bytes,
                        "xxh3_128": manifest.files[file].xxh3_128,
                    }
                    for file in manifest.items[name].files
                },
                "aliases": dict(manifest.items[name].aliases),
            }
            for name in names
        },
    }


def _add_tensors(data: dict[str, Any], folder: Any) -> None:
    from accel_parallel.checkpoint.store import Checkpoint

    checkpoint = Checkpoint(folder)
    for name, item in data["items"].items():
        item["tensors"] = {
            key: {"dtype": str(each.dtype).removeprefix("torch."), "shape": list(each.shape), "size_bytes": each.nbytes}
            for key, each in checkpoint.tensors(name).items()
            if key not in item["aliases"]
        }


def _lines(data: dict[str, Any], single: bool) -> list[str]:
    mesh = "".join(f", {axis}={size}" for axis, size in data["mesh"].items())
    processes = "1 process" if data["world_size"] == 1 else f"{data['world_size']} processes"
    lines = [
        data["path"],
        f"  step       {data['step']:,}",
        f"  world      {processes}{mesh}",
        f"  strategy   {data['strategy']}",
        f"  libraries  {', '.join(f'{name} {version}' for name, version in data['libraries'].items())}",
        f"  size       {size_text(data['size_bytes'])} in {data['num_files']} files",
        "",
    ]
    rows = [
        [name, item["kind"], size_text(item["size_bytes"]), ", ".join(_collapsed(item["files"]))]
        for name, item in data["items"].items()
    ]
    lines += table(("item", "kind", "size", "files"), rows, right=("size",))
    for name, item in data["items"].items():
        if single:
            lines += ["", *_file_table(item["files"])]
        if "tensors" in item:
            lines += ["", *_tensor_table(name, item)]
    return lines


def _file_table(files: dict[str, Any]) -> list[str]:
    rows = [[name, size_text(each["size_bytes"]), each["xxh3_128"]] for name, each in files.items()]
    return table(("file", "size", "xxh3_128"), rows, right=("size",))


def _tensor_table(name: str, item: dict[str, Any]) -> list[str]:
    rows = [
        [key, each["dtype"], "x".join(str(size) for size in each["shape"]) or "scalar", size_text(each["size_bytes"])]
        for key, each in item["tensors"].items()
    ]
    if not rows:
        return [f"{name} holds no tensors."]
    lines = table((f"tensor of {name}", "dtype", "shape", "size"), rows, right=("size",))
    return lines + [f"{alias} is {other}" for alias, other in item["aliases"].items()]


def _collapsed(files: dict[str, Any]) -> list[str]:
    """Names with the many parts of one item said once."""
    found: dict[str, int] = {}
    for name in files:
        stem = re.sub(r"-\d{5}-of-(\d{5})\.", r"-…-of-\1.", name)
        found[stem] = found.get(stem, 0) + 1
    return [f"{name} ({count} files)" if count > 1 else name for name, count in found.items()]
