"""How many bytes the modules of a model take, without making any of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping

import torch
from torch import nn

from accel_bigmodel.tied import tensor_identity
from accel_state.config import did_you_mean
from accel_state.dtypes import dtype_size_bytes, parse_dtype
from accel_state.errors import ConfigError

__all__ = [
    "calculate_maximum_sizes",
    "compute_module_sizes",
    "format_bytes",
    "named_module_tensors",
    "print_sizes",
    "size_table",
    "total_size_bytes",
]


def named_module_tensors(
    module: nn.Module, *, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of `module`, parameters first; a tied one under each of its names.

    Args:
        module: any module.
        include_buffers: whether buffers come too.
        recurse: whether those of submodules come too.
        remove_non_persistent: whether buffers that a ``state_dict`` leaves out are left out.
    """
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    if not include_buffers:
        return
    dropped = _non_persistent(module) if remove_non_persistent else frozenset()
    for name, buffer in module.named_buffers(recurse=recurse, remove_duplicate=False):
        if name not in dropped:
            yield name, buffer


def compute_module_sizes(
    model: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of every module and every tensor of `model` by name; the whole model is ``""``.

    A tied tensor counts once in each module that holds it, however often. So an output layer tied to the embedding
    shows its size, the model that holds both counts it once, and the sizes of children may add up to more than their
    parent's.

    Args:
        model: any module, also on the meta device.
        dtype: what floating-point tensors are to be converted to; integers and booleans stay. Default: as they are.
        special_dtypes: exceptions from that by the name of a tensor, integers too.
        buffers_only: whether parameters are left out.

    Raises:
        ConfigError: if `special_dtypes` names a tensor that the model does not have, or a dtype is unknown.
    """
    tensors = list(named_module_tensors(model, recurse=True))
    special = {name: parse_dtype(each) for name, each in (special_dtypes or {}).items()}
    _check_names(special, [name for name, _ in tensors])
    general = None if dtype is None else parse_dtype(dtype)
    sizes: dict[str, int] = {"": 0} | {name: 0 for name, _ in model.named_modules(remove_duplicate=False)}
    counted: set[tuple[str, Hashable]] = set()
    for name, tensor in list(model.named_buffers(remove_duplicate=False)) if buffers_only else tensors:
        converted = general if general is not None and tensor.is_floating_point() else tensor.dtype
        size_bytes = math.ceil(tensor.numel() * dtype_size_bytes(special.get(name, converted)))
        identity = tensor_identity(tensor)
        parts = name.split(".")
        for length in range(len(parts) + 1):
            prefix = ".".join(parts[:length])
            if (prefix, identity) not in counted:
                counted.add((prefix, identity))
                sizes[prefix] = sizes.get(prefix, 0) + size_bytes
    return sizes


def total_size_bytes(model: nn.Module, *, dtype: torch.dtype | str | None = None) -> int:
    """Bytes of all parameters and buffers of `model`, tied ones once, converted to `dtype` if one is given."""
    return compute_module_sizes(model, dtype=dtype)[""]


def calculate_maximum_sizes(
    model: nn.Module, *, no_split_classes: Collection[str] | None = None
) -> tuple[int, tuple[int, list[str]]]:
    """The bytes of `model`, and those of its largest layer with the names of all layers of that size.

    A layer is what must lie on one device: a module without submodules, a module of one of `no_split_classes`, or a
    tensor that a larger module holds itself.

    Args:
        model: any module, also on the meta device.
        no_split_classes: names of classes; by default those that the model lists in ``_no_split_modules``.
    """
    declared = getattr(model, "_no_split_modules", None) or ()
    classes = frozenset(declared if no_split_classes is None else no_split_classes)
    sizes = compute_module_sizes(model)
    layers = list(_layers(model, "", classes))
    largest_bytes = max((sizes[name] for name in layers), default=0)
    return sizes[""], (largest_bytes, [name for name in layers if sizes[name] == largest_bytes])


def format_bytes(size_bytes: float) -> str:
    """`size_bytes` with a binary unit: ``"1.50 GiB"``."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size_bytes /= 1024
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.2f} {unit}"
    return f"{size_bytes / 1024:.2f} PiB"


def size_table(model: nn.Module, *, dtype: torch.dtype | str | None = None, depth: int = 1) -> str:
    """The modules of `model` down to `depth` with their elements, bytes and share of the whole, as aligned text.

    Args:
        model: any module, also on the meta device.
        dtype: as for `compute_module_sizes`.
        depth: levels of submodules that are shown; 0 shows the whole model only.
    """
    sizes = compute_module_sizes(model, dtype=dtype)
    total = sizes[""]
    cells = [("module", "class", "elements", "size", "share")]
    for name, module in model.named_modules(remove_duplicate=False):
        level = name.count(".") + 1 if name else 0
        if level <= depth:
            distinct = {tensor_identity(each): each.numel() for _, each in named_module_tensors(module, recurse=True)}
            share = f"{sizes[name] / total:.1%}" if total else "-"
            shown = "  " * level + (name.rpartition(".")[2] or "(model)")
            row = (shown, type(module).__name__, f"{sum(distinct.values()):,}", format_bytes(sizes[name]), share)
            cells.append(row)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1])] + [row[i].rjust(widths[i]) for i in (2, 3, 4)])
        for row in cells
    )


def print_sizes(model: nn.Module, *, dtype: torch.dtype | str | None = None, depth: int = 1) -> None:
    """Print `size_table`."""
    print(size_table(model, dtype=dtype, depth=depth))


def _non_persistent(module: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, each in module.named_modules(remove_duplicate=False)
        for name in each._non_persistent_buffers_set
    )


def _check_names(special: Mapping[str, torch.dtype], known: list[str]) -> None:
    for name in special:
        if name not in known:
            raise ConfigError(
                f"`special_dtypes` gives a dtype for {name!r}, but the model has no parameter or buffer of that name."
                f"{did_you_mean(name, known)} Give the full name, as `model.named_parameters()` shows it."
            )


def _layers(module: nn.Module, prefix: str, no_split: frozenset[str]) -> Iterator[str]:
    """Names of what must lie on one device, in the order of the model."""
    children = list(module.named_children())
    if prefix and (not children or type(module).__name__ in no_split):
        yield prefix
        return
    dotted = f"{prefix}." if prefix else ""
    for name, _ in named_module_tensors(module):
        yield dotted + name
    for name, child in children:
        yield from _layers(child, dotted + name, no_split)
