"""`accel checkpoint consolidate`: the weights of a model in files as other programs read them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accel_parallel.checkpoint.folder import Folder, LocalFolder, sync_to_disk
from accel_parallel.checkpoint.layout import remove_tree
from accel_parallel.checkpoint.location import is_remote
from accel_parallel.checkpoint.manifest import MANIFEST_NAME
from accel_parallel.checkpoint_commands.arguments import Arguments, size_in_bytes
from accel_parallel.checkpoint_commands.places import find_checkpoint
from accel_parallel.checkpoint_commands.progress import bytes_bar
from accel_parallel.checkpoint_commands.text import size_text
from accel_state.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from accel_parallel.checkpoint.tensor_file import StoredTensor
    from accel_state.tensor_format import TensorShape

__all__ = ["main"]

_DTYPES = ("float64", "float32", "float16", "bfloat16")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_NOTES = """\
Writes `model.safetensors`, or `model-00001-of-00003.safetensors` ... and `model.safetensors.index.json`, which
`from_pretrained` and any reader of safetensors take. Other files of the folder, such as `config.json`, stay.

The checkpoint's files are proved first. Memory: one tensor and buffers. Tied weights are written once, under their
first name, since models tie them again when they load. Files take their names when all are written.

examples
  accel checkpoint consolidate runs/7b exported
  accel checkpoint consolidate runs/7b/checkpoints/checkpoint_3 exported --dtype bfloat16 --max-shard-size 2GB"""


def main(argv: Sequence[str]) -> int:
    """Write them."""
    arguments = Arguments("consolidate", notes=_NOTES)
    arguments.add_argument("checkpoint", metavar="CHECKPOINT", help="its folder, or a run's for the latest one")
    arguments.add_argument("output", metavar="OUTPUT", help="folder to write into, made if missing")
    arguments.add_argument("--item", default="model", metavar="NAME", help="which model, by default `model`")
    arguments.add_argument("--dtype", choices=_DTYPES, help="of floating-point tensors, by default what they are")
    arguments.add_argument(
        "--max-shard-size", type=size_in_bytes, default=5 * 10**9, metavar="SIZE", help="of one file, by default 5GB"
    )
    arguments.add_argument("--force", action="store_true", help="replace weights that are there")
    options = arguments.read(argv)
    if options is None:
        return 0
    if is_remote(options.output):
        raise ConfigError(
            f"`{options.output}` is a URL, and weights are written to this machine. Name a folder, and upload that."
        )
    output = Path(options.output)
    _refuse_existing(output, force=options.force)
    names, total, ties = _consolidate(
        find_checkpoint(options.checkpoint), options.item, output, options.dtype, options.max_shard_size
    )
    print(f"{output}: {', '.join(names)}, {size_text(total)}")
    for alias, name in ties.items():
        print(f"  {alias} is {name}, and is not written twice")
    return 0


def _refuse_existing(output: Path, *, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`{output}` is a file, and weights go into a folder. Name a folder.")
    if (output / MANIFEST_NAME).exists():
        raise ConfigError(
            f"`{output}` is a checkpoint, whose own weights these would replace, and it could not be loaded any more. "
            f"Name another folder."
        )
    there = _weights_in(output)
    if there and not force:
        raise ConfigError(
            f"`{output}` holds {', '.join(there)} already, which would be replaced. Name another folder, or give "
            f"`--force`."
        )


def _weights_in(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if _WEIGHTS.fullmatch(path.name)) if output.is_dir() else []


def _consolidate(
    folder: Folder, item: str, output: Path, dtype: str | None, limit: int
) -> tuple[list[str], int, Mapping[str, str]]:
    """Names of the files, bytes of the tensors, and ties that were left out."""
    import torch

    from accel_parallel.checkpoint.store import Checkpoint
    from accel_state.tensor_format import TensorShape

    checkpoint = Checkpoint(folder)
    tensors = checkpoint.tensors(item)
    record = checkpoint.items[item]
    if f"{item}.json" in record.files:
        raise CheckpointError(
            f"`{item}` in `{folder.location}` is no plain set of tensors but a {record.kind}, whose other values such "
            f"files cannot hold. Give `--item` the name of a model: {_models(checkpoint.items)}."
        )
    wanted = getattr(torch, dtype) if dtype else None
    held = {
        name: TensorShape(tuple(each.shape), wanted if wanted and each.dtype.is_floating_point else each.dtype)
        for name, each in tensors.items()
        if name not in record.aliases
    }
    shards = _shards(held, limit)
    total = sum(each.nbytes for each in held.values())
    proved = sum(checkpoint.manifest.files[name].size_bytes for name in record.files)
    with bytes_bar(proved + total, "consolidate") as step:
        checkpoint.verify([item], progress=step)
        _write(output, shards, tensors, held, step)
    return list(shards), total, record.aliases


def _models(items: Mapping[str, object]) -> str:
    return ", ".join(name for name in items if name.startswith("model")) or "there is none"


def _shards(held: Mapping[str, TensorShape], limit: int) -> dict[str, list[str]]:
    """Names of tensors by that of the file; a file is full before the next begins."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, shape in held.items():
        if parts[-1] and size + shape.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += shape.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, start=1)}


def _write(
    output: Path,
    shards: Mapping[str, Sequence[str]],
    tensors: Mapping[str, StoredTensor],
    held: Mapping[str, TensorShape],
    step: Callable[[int], None],
) -> None:
    """All files under names of their own first; then each takes its name, the index last."""
    fresh = not output.exists()
    mark = f".tmp-{secrets.token_hex(4)}"
    gathered = output.with_name(f".{output.name}{mark}") if fresh else output / mark
    gathered.mkdir(parents=True)
    try:
        folder = LocalFolder(gathered)
        names = list(shards)
        for name, part in shards.items():
            folder.write(name, _chunks({key: held[key] for key in part}, tensors, step), sync=True)
        if len(shards) > 1:
            folder.write(_INDEX, [_index(shards, held)], sync=True)
            names.append(_INDEX)
        if fresh:
            gathered.rename(output)
        else:
            for name in names:
                (gathered / name).replace(output / name)
            for name in set(_weights_in(output)) - set(names):
                (output / name).unlink()
        sync_to_disk(output)
        sync_to_disk(output.parent)
    finally:
        remove_tree(gathered)


def _chunks(
    held: Mapping[str, TensorShape], tensors: Mapping[str, StoredTensor], step: Callable[[int], None]
) -> Iterator[bytes | memoryview]:
    from accel_state.tensor_format import bytes_of, file_header, order_in_file

    yield file_header(held)
    for name in order_in_file(held):
        found: torch.Tensor = tensors[name].view().to(held[name].dtype)
        yield bytes_of(found)
        step(held[name].nbytes)


def _index(shards: Mapping[str, Sequence[str]], held: Mapping[str, TensorShape]) -> bytes:
    where = {name: file for file, part in shards.items() for name in part}
    total = sum(each.nbytes for each in held.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
    return text.encode() + b"\n"
