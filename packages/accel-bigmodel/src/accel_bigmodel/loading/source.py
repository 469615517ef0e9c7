"""What a checkpoint holds, whatever its files are: each tensor with its dtype, its shape and where its values lie."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from accel_bigmodel.loading.pickled import MappedTensor, read_pickled
from accel_bigmodel.stored import INDEX_NAMES, StoredTensor, read_file_header, read_index, read_weight_map
from accel_state.config import did_you_mean
from accel_state.errors import CheckpointError

__all__ = ["Source", "open_checkpoint"]

Source: TypeAlias = StoredTensor | MappedTensor

PICKLED_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""What a folder holds where the weights of a model were pickled, in the order in which it is looked for."""
_PICKLED = (".bin", ".pt", ".pth")


def open_checkpoint(checkpoint: str | Path) -> dict[str, Source]:
    """Every tensor of a checkpoint by name. No values are read.

    Args:
        checkpoint: a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, an ``.index.json`` of such, or a folder with
            one of them. Where a folder holds both kinds, the safetensors count.

    Raises:
        CheckpointError: if there is nothing of the kind, or it is damaged or incomplete.
        OSError: if a file cannot be read.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".json" and path.is_file():
        return _open_index(path)
    if path.suffix in _PICKLED and path.is_file():
        return dict(read_pickled(path))
    if path.is_file():
        return dict(read_file_header(path))
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    raise CheckpointError(
        f"There is no file or folder `{path}`.{did_you_mean(path.name, beside)} Give the checkpoint's folder, its "
        f"`.index.json` or its file. Nothing is downloaded here: download it first."
    )


def _open_folder(folder: Path) -> dict[str, Source]:
    has_safetensors = any((folder / name).is_file() for name in INDEX_NAMES) or any(folder.glob("*.safetensors*"))
    if has_safetensors:
        return dict(read_index(folder))
    for name in PICKLED_NAMES:
        if (folder / name).is_file():
            return open_checkpoint(folder / name)
    indices = sorted(folder.glob("*.bin.index.json"))
    files = sorted(each for suffix in _PICKLED for each in folder.glob(f"*{suffix}"))
    chosen = indices if indices else files
    if len(chosen) != 1:
        what = f"several ({', '.join(each.name for each in chosen)})" if chosen else "no file with weights"
        raise CheckpointError(
            f"The folder `{folder}` holds {what}, so what to load is not known. Give the file or the index itself: "
            f"`.safetensors`, `.bin`, `.pt`, `.pth`, or an `.index.json` of them."
        )
    return open_checkpoint(chosen[0])


def _open_index(index: Path) -> dict[str, Source]:
    weight_map = read_weight_map(index)
    if not any(Path(each).suffix in _PICKLED for each in weight_map.values()):
        return dict(read_index(index))
    shards = {each: read_pickled(index.parent / each) for each in sorted(set(weight_map.values()))}
    found: dict[str, Source] = {}
    for name, file_name in weight_map.items():
        if name not in shards[file_name]:
            raise CheckpointError(
                f"`{index}` places `{name}` in `{file_name}`, but that file does not hold it."
                f"{did_you_mean(name, list(shards[file_name]))} Copy or download index and shards together."
            )
        found[name] = shards[file_name][name]
    return found
