"""Where the values of a model come from while it is sharded, so that no process holds more than it must.

`FromRankZero` sends a unit's tensors just before the unit is sharded; `FromFiles` lets every process read its own part
just after. Either way a process holds its shards and at most one whole unit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from accel_parallel.sharded import box_of, local_of
from accel_state.errors import CheckpointError, ConfigError

__all__ = ["AsTheyAre", "FromFiles", "FromRankZero", "WeightSource"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class WeightSource(Protocol):
    """Called in this order for each model, by every rank."""

    fills_meta: bool
    """Whether it gives values to what is on the meta device."""

    def check(self, model: nn.Module) -> None:
        """Before anything is changed. Raises where it cannot fill what is there."""

    def before(self, tensors: Iterable[tuple[str, torch.Tensor]], model: nn.Module) -> None:
        """These parameters and buffers are about to be sharded."""

    def after(self, model: nn.Module) -> None:
        """Everything is sharded."""


class AsTheyAre:
    """Every process has the values already, and they are believed to be alike."""

    fills_meta = False

    def check(self, model: nn.Module) -> None: ...

    def before(self, tensors: Iterable[tuple[str, torch.Tensor]], model: nn.Module) -> None: ...

    def after(self, model: nn.Module) -> None: ...


class FromRankZero:
    """Rank 0 has the values; the others may have a model on the meta device."""

    def __init__(self, device: torch.device, *, fills_meta: bool) -> None:
        """
        Args:
            device: where tensors are sent, and where the model is sharded.
            fills_meta: whether other ranks may be on the meta device; without it they only take rank 0's values over.
        """
        self.device = device
        self.fills_meta = fills_meta

    def check(self, model: nn.Module) -> None:
        if not self.fills_meta or dist.get_rank() > 0:
            return
        for name, tensor in _tensors(model):
            if tensor.is_meta:
                raise ConfigError(
                    f"`cpu_ram_efficient_loading=True` takes the weights from rank 0, whose `{name}` is on the meta "
                    f"device too. Load the weights on rank 0, or give `weights_path` to read them from files."
                )

    def before(self, tensors: Iterable[tuple[str, torch.Tensor]], model: nn.Module) -> None:
        places = _places(model) if self.fills_meta else {}
        for _, tensor in tensors:
            if tensor.is_meta:
                value: torch.Tensor = torch.empty_like(tensor, device=self.device)
            elif tensor.device == self.device:
                value = tensor.detach()
            else:
                value = tensor.detach().to(self.device)
            whole = value.contiguous()
            dist.broadcast(whole, src=0)
            if tensor.is_meta:
                _replace(tensor, whole, places[id(tensor)])
            elif tensor.device != self.device or whole.data_ptr() != tensor.data_ptr():
                tensor.data = whole

    def after(self, model: nn.Module) -> None: ...


class FromFiles:
    """Each process reads its own part of each tensor from safetensors files, and no more of it."""

    fills_meta = True

    def __init__(self, path: Path, device: torch.device) -> None:
        """
        Args:
            path: a file, an index of files, or the folder of either.
            device: where the parts go.

        Raises:
            CheckpointError: if there are no such files.
        """
        self.path = path
        self.device = device
        self._file_of = _files_by_name(path)

    def check(self, model: nn.Module) -> None:
        persistent = set(model.state_dict())
        for name, tensor in model.named_buffers():
            if tensor.is_meta and name not in persistent:
                raise ConfigError(
                    f"The buffer `{name}` is on the meta device and no checkpoint holds it, since it is computed when "
                    f"a model is built. Build the model with `init_empty_weights()`, which leaves buffers real."
                )
        empty = {name for name, tensor in _tensors(model) if tensor.is_meta}
        missing = [
            names
            for names in _by_tensor(model).values()
            if empty.intersection(names) and not any(name in self._file_of for name in names)
        ]
        if missing:
            first = ", ".join(f"`{names[0]}`" for names in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CheckpointError(
                f"`{self.path}` lacks {first}{more}, so the model would start from values that nobody chose. "
                f"Give the files of this model, or build the model that they belong to."
            )

    def before(self, tensors: Iterable[tuple[str, torch.Tensor]], model: nn.Module) -> None: ...

    def after(self, model: nn.Module) -> None:
        empty = {name for name, tensor in _tensors(model) if tensor.is_meta}
        device = self.device
        # FSDP's own `_apply` tells its parts of the new tensors.
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]
        with ExitStack() as stack, torch.no_grad():
            opened: dict[Path, Any] = {}
            targets = dict(_tensors(model))
            for names in _by_tensor(model).values():
                name = next((name for name in names if name in self._file_of), None)
                if name is None or not empty.intersection(names):
                    continue
                file = self._file_of[name]
                if file not in opened:
                    opened[file] = stack.enter_context(_open(file))
                _read_part(opened[file], name, targets[names[0]], file)


def _read_part(reader: Any, name: str, target: torch.Tensor, file: Path) -> None:
    stored = reader.get_slice(name)
    shape = tuple(stored.get_shape())
    if shape != tuple(target.shape):
        raise CheckpointError(
            f"`{name}` has shape {shape} in `{file}` and {tuple(target.shape)} in the model. "
            f"Give the files of this model, or build the model that they belong to."
        )
    box = box_of(target)
    if box.is_empty:
        return
    part = stored[box.slices] if shape else reader.get_tensor(name)
    local = local_of(target)
    if torch.promote_types(part.dtype, local.dtype) is not local.dtype:
        raise CheckpointError(
            f"`{name}` is {part.dtype} in `{file}` and {local.dtype} in the model, and reading it would round it "
            f"without a word. Build the model in {part.dtype}."
        )
    local.copy_(part)


def _files_by_name(path: Path) -> dict[str, Path]:
    if path.is_dir():
        path = path / _INDEX if (path / _INDEX).is_file() else path / _SINGLE
    if not path.is_file():
        raise CheckpointError(
            f"`weights_path` leads to `{path}`, and there is no such file. Give a safetensors file, an index of such "
            f"files (`{_INDEX}`), or the folder of either."
        )
    if path.suffix == ".json":
        names: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {})
        found = {name: path.parent / file for name, file in names.items()}
        absent = sorted({file.name for file in found.values() if not file.is_file()})
        if absent:
            raise CheckpointError(
                f"`{path}` names {', '.join(f'`{name}`' for name in absent)}, which is not beside it. "
                f"Complete the folder, or give another."
            )
        return found
    with _open(path) as reader:
        return dict.fromkeys(reader.keys(), path)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"`{path}` is no readable safetensors file ({error}). Copy it again, or give another."
        ) from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """The names of each tensor of the state, by its identity: several where it is tied."""
    names: dict[int, list[str]] = {}
    persistent = set(model.state_dict())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in persistent:
            names.setdefault(id(buffer), []).append(name)
    return names


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Wherever the modules hold a tensor, by its identity."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((held, key))
    return places


def _replace(old: torch.Tensor, new: torch.Tensor, places: list[tuple[dict[str, Any], str]]) -> None:
    """Put `new` in the place of a tensor on the meta device, wherever it is held."""
    value = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for held, key in places:
        held[key] = value
