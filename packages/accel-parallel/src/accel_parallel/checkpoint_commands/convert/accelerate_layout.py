"""Folders that `save_state` of Hugging Face accelerate wrote.

Their names, as of accelerate 1.15: ``model.safetensors`` or ``pytorch_model.bin`` (``model_1...`` for a second model,
``pytorch_model_fsdp...`` with FSDP), ``optimizer.bin``, ``scheduler.bin``, ``sampler.bin``, ``dl_state_dict.bin``,
``scaler.pt``, ``random_states_<rank>.pkl`` and ``custom_checkpoint_<n>.pkl``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accel_parallel.checkpoint.codec import Leaf
from accel_parallel.checkpoint.item import Item
from accel_parallel.checkpoint_commands.convert.distributed import METADATA, DistributedCheckpoint
from accel_parallel.checkpoint_commands.convert.foreign import load
from accel_parallel.checkpoint_commands.convert.found import Asked, Found, numbered
from accel_parallel.checkpoint_commands.convert.optimizers import add_optimizers
from accel_parallel.checkpoint_commands.convert.weights import read_weights, strip
from accel_state.errors import CheckpointError

__all__ = ["read_accelerate"]

_COMPILED = "_orig_mod."


def read_accelerate(folder: Path, asked: Asked) -> Found:
    """Everything in such a folder that can be converted. Tensors stay in their files.

    Raises:
        CheckpointError: if weights or the state of an optimizer cannot be read as such.
    """
    found = Found(source="accelerate")
    ranks = sorted(int(match[1]) for path in folder.iterdir() if (match := _rank(path.name)))
    found.world_size = max(1, len(ranks))
    ordered = _add_models(folder, found, asked)
    _add_optimizers(folder, found, asked, ordered)
    for index, path in _numbered_files(folder, "scheduler", ".bin"):
        _add_plain(found, path, numbered("scheduler", index), "scheduler")
    if (folder / "scaler.pt").is_file():
        _add_plain(found, folder / "scaler.pt", "scaler", "scaler")
    for path in sorted(folder.glob("custom_checkpoint_*.pkl"), key=lambda path: int(_digits(path.name) or 0)):
        _add_plain(found, path, numbered("custom", int(_digits(path.name) or 0)), "custom")
    for rank in ranks:
        _add_generators(found, folder / f"random_states_{rank}.pkl", rank)
    for path in sorted([*folder.glob("sampler*.bin"), *folder.glob("dl_state_dict*.bin")]):
        found.left_out.append(f"{path.name}: places in the data are kept in another way here")
    return found


def _rank(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"random_states_([0-9]+)\.pkl", name)


def _digits(name: str) -> str | None:
    match = re.search(r"_([0-9]+)\.", name)
    return match[1] if match else None


def _numbered_files(folder: Path, stem: str, suffix: str) -> Iterator[tuple[int, Path]]:
    index = 0
    while (path := folder / f"{numbered(stem, index)}{suffix}").is_file():
        yield index, path
        index += 1


def _model_paths(folder: Path, index: int) -> list[Path]:
    ending = "" if index == 0 else f"_{index}"
    names = [
        f"model{ending}.safetensors",
        f"model{ending}.safetensors.index.json",
        f"pytorch_model{ending}.bin",
        f"pytorch_model{ending}.bin.index.json",
        f"pytorch_model_fsdp{ending}.bin",
        f"pytorch_model_fsdp_{index}",
    ]
    return [path for name in names if (path := folder / name).exists()]


def _add_models(folder: Path, found: Found, asked: Asked) -> bool:
    """Whether all weights are in the order of the models' state dicts."""
    ordered, index = True, 0
    while paths := _model_paths(folder, index):
        if len(paths) > 1:
            raise CheckpointError(
                f"`{folder}` holds one model twice, in {paths[0].name} and {paths[1].name}, and which is meant is not "
                f"said. Remove the one that is not."
            )
        path, name = paths[0], numbered("model", index)
        tensors = _divided_weights(path) if path.is_dir() else read_weights(path)
        ordered = ordered and path.suffix == ".bin"
        tensors = _unwrapped(tensors, found)
        for alias, other in asked.ties if index == 0 else ():
            if other not in tensors or alias in tensors:
                problem = f"lacks `{other}`" if other not in tensors else f"holds `{alias}` too"
                raise CheckpointError(
                    f"`--tie {alias}={other}`: `{path.name}` {problem}. Give the missing name first, and then the one "
                    f"that is there."
                )
            tensors[alias] = tensors[other]
        found.items.append(Item(name, "model", tensors))
        index += 1
    if not index:
        kept = " DeepSpeed's own files are in it: convert those with its `zero_to_fp32.py` first."
        raise CheckpointError(
            f"`{folder}` holds no weights that `save_state` of accelerate writes, such as `model.safetensors`."
            f"{kept if (folder / 'pytorch_model').is_dir() else ''} Name the folder that `save_state` was given."
        )
    return ordered


def _divided_weights(path: Path) -> dict[str, Leaf]:
    tensors, _ = DistributedCheckpoint(path).tensors("model")
    if not tensors:
        raise CheckpointError(
            f"`{path}` holds no tensors under `model`, where accelerate puts them. Convert that folder by itself, with "
            f"`--from dcp`."
        )
    return dict(tensors)


def _unwrapped(tensors: dict[str, Leaf], found: Found) -> dict[str, Leaf]:
    """Without what `torch.compile` puts in front of every name. accelerate keeps models as they were before DDP."""
    stripped = strip(tensors, _COMPILED)
    if stripped is None:
        return tensors
    found.notes.append(f"`{_COMPILED}`, which `torch.compile` puts in front of names, was removed")
    return stripped


def _add_optimizers(folder: Path, found: Found, asked: Asked, ordered: bool) -> None:
    raw: list[tuple[str, Any]] = []
    while True:
        name = numbered("optimizer", len(raw))
        if (folder / f"{name}.bin").is_file():
            raw.append((f"{name}.bin", load(folder / f"{name}.bin")))
        elif (folder / f"optimizer_{len(raw)}" / METADATA).is_file():
            path = folder / f"optimizer_{len(raw)}"
            raw.append((path.name, DistributedCheckpoint(path).tree("optimizer")))
        else:
            break
    add_optimizers(found, raw, asked, ordered=ordered)


def _add_plain(found: Found, path: Path, name: str, kind: str) -> None:
    try:
        found.items.append(Item(name, kind, load(path)))
    except CheckpointError as error:
        found.left_out.append(f"{path.name}: {error}")


def _add_generators(found: Found, path: Path, rank: int) -> None:
    try:
        found.items.append(Item(f"rng_{rank}", "rng", _generators(load(path, arrays=True), rank)))
    except CheckpointError as error:
        found.left_out.append(f"{path.name}: {error}")
    except (KeyError, TypeError, ValueError) as error:
        found.left_out.append(f"{path.name}: it is no state of generators as accelerate keeps it ({error!r})")


def _generators(raw: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """As `accel_state.rng.rng_state` gives it."""
    version, words, gauss = raw["random_state"]
    kind, keys, position, has_gauss, cached = raw["numpy_random_seed"]
    devices = raw.get("torch_cuda_manual_seed") or []
    # accelerate keeps those of all devices that a process sees; its own is that of its number on the machine.
    own = devices[rank % len(devices)] if devices else None
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "bit_generator": kind,
            "state": {"key": keys.tolist(), "pos": int(position)},
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": raw["torch_manual_seed"],
        "device": {"type": "cpu" if own is None else "cuda", "state": own},
    }
