"""What the weights of a model take in each dtype, and quantized as the usual libraries do it. No value is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel_bigmodel.sizes import calculate_maximum_sizes, compute_module_sizes
from accel_bigmodel.stored import StoredTensor
from accel_bigmodel.tied import tensor_identity
from accel_state.blocks import find_blocks, outermost
from accel_state.dtypes import dtype_size_bytes, parse_dtype

__all__ = ["DTYPES", "QUANTIZATIONS", "Weights", "stored_weights", "weights_of"]

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
"""Dtypes that a table of weights has, unless others are asked for."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How a library stores a linear layer of `out` rows and `size` elements."""

    element_bytes: float
    block: int
    """Elements that share a scale; 0: those of a row."""
    scale_bytes: float
    """For each block or row."""
    fixed_bytes: int
    """For each layer."""
    converts: tuple[str, ...]
    """Names of the classes it takes."""
    how: str


_LINEAR, _WITH_CONV1D = ("Linear",), ("Linear", "Conv1D")
# Of bitsandbytes 0.50 (functional.quantize_4bit: blocks of 64, a code of 16 float32; scales of double quantization in
# blocks of 256 with a code of 256 float32) and torchao 0.18 (Int8Tensor: float32 scale and int8 zero point a row; int4:
# a bfloat16 scale and zero point for each group of 128).
QUANTIZATIONS: Mapping[str, _Scheme] = {
    "bitsandbytes int8": _Scheme(1, 0, 4, 0, _WITH_CONV1D, "a byte an element, a float32 scale a row"),
    "bitsandbytes nf4": _Scheme(0.5, 64, 4, 64, _WITH_CONV1D, "4 bits an element, a float32 scale for 64"),
    "bitsandbytes nf4, double": _Scheme(
        0.5, 64, 1 + 4 / 256, 64 + 1024 + 4, _WITH_CONV1D, "4 bits an element, a scale for 64 in 8 bits"
    ),
    "torchao int8": _Scheme(1, 0, 5, 0, _LINEAR, "a byte an element, a scale and a zero point a row"),
    "torchao int4": _Scheme(0.5, 128, 4, 0, _LINEAR, "4 bits an element, a scale and a zero point for 128"),
}
"""Ways to quantize. Each takes linear layers but not the head, and leaves the rest in 16 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One way to store the weights of a model."""

    name: str
    total_bytes: int
    largest_bytes: int
    """Of the largest layer that one device must hold."""
    largest: str
    """Its name; empty where the model has none."""
    how: str


def weights_of(model: nn.Module, *, dtypes: tuple[str | torch.dtype, ...] = DTYPES) -> tuple[Weights, ...]:
    """One row for each of `dtypes`, then one for each of `QUANTIZATIONS` that finds a layer to quantize.

    Parameters and buffers count, tied ones once. In the row of a dtype all floating-point tensors have it,
    without scales.

    Raises:
        ConfigError: for a dtype that there is not.
    """
    layers = calculate_maximum_sizes(model)[1][1]
    rows = []
    for each in dtypes:
        dtype = parse_dtype(_known(each))
        sizes = compute_module_sizes(model, dtype=dtype)
        bits = dtype_size_bytes(dtype) * 8
        how = f"every floating-point element in {bits:g} bits" + (", scales not counted" if bits <= 8 else "")
        rows.append(_row(str(dtype).removeprefix("torch."), sizes, layers, how))
    for name, scheme in QUANTIZATIONS.items():
        chosen = _quantized(model, scheme)
        if chosen:
            rows.append(_quantized_row(model, name, scheme, chosen, layers))
    return tuple(rows)


def stored_weights(
    stored: Mapping[str, StoredTensor], *, dtypes: tuple[str | torch.dtype, ...] = DTYPES
) -> tuple[Weights, ...]:
    """The same of the headers of a checkpoint: as it is stored, then in each of `dtypes`; the largest single tensor."""
    sizes = {name: each.nbytes for name, each in stored.items()}
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in stored.values()})
    rows = [_flat_row("as stored", sizes, f"the checkpoint's own bytes ({', '.join(kinds)})")]
    for each in dtypes:
        dtype = parse_dtype(_known(each))
        bits = dtype_size_bytes(dtype) * 8
        sizes = {name: _converted_bytes(tensor, dtype) for name, tensor in stored.items()}
        how = f"every floating-point element in {bits:g} bits"
        rows.append(_flat_row(str(dtype).removeprefix("torch."), sizes, how))
    return tuple(rows)


def _converted_bytes(stored: StoredTensor, dtype: torch.dtype) -> int:
    kept = dtype if stored.dtype.is_floating_point else stored.dtype
    return math.ceil(math.prod(stored.shape) * dtype_size_bytes(kept))


def _known(dtype: str | torch.dtype) -> str | torch.dtype:
    short = {"fp8": "float8_e4m3fn", "float8": "float8_e4m3fn"}
    return short.get(dtype, dtype) if isinstance(dtype, str) else dtype


def _row(name: str, sizes: Mapping[str, int], layers: list[str], how: str) -> Weights:
    largest = max(layers, key=lambda each: sizes[each], default="")
    return Weights(
        name=name, total_bytes=sizes[""], largest_bytes=sizes[largest] if largest else 0, largest=largest, how=how
    )


def _flat_row(name: str, sizes: Mapping[str, int], how: str) -> Weights:
    largest = max(sizes, key=lambda each: sizes[each], default="")
    return Weights(
        name=name, total_bytes=sum(sizes.values()), largest_bytes=sizes.get(largest, 0), largest=largest, how=how
    )


def _quantized(model: nn.Module, scheme: _Scheme) -> dict[str, nn.Module]:
    """The layers that a library would quantize: all of its classes, but not the head nor what shares its weight."""
    heads = _heads(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in scheme.converts
        and isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.dim() == 2
        and tensor_identity(module.weight) not in heads
    }


def _heads(model: nn.Module) -> set[Any]:
    """The weights that turn the last state into predictions; of a model that does not tell, the last linear layer."""
    told = getattr(model, "get_output_embeddings", None)
    head = told() if callable(told) else None
    if head is None:
        inside = tuple(f"{name}." for name, _ in outermost(find_blocks(model)))
        linear = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(inside or ("\0",))
        ]
        head = linear[-1] if linear and len(list(model.children())) > 1 else None
    weight = getattr(head, "weight", None)
    return {tensor_identity(weight)} if isinstance(weight, torch.Tensor) else set()


def _quantized_row(
    model: nn.Module, name: str, scheme: _Scheme, chosen: Mapping[str, nn.Module], layers: list[str]
) -> Weights:
    sizes = compute_module_sizes(model, dtype=torch.bfloat16)
    saved = dict.fromkeys(sizes, 0)
    counted = set()
    for path, module in chosen.items():
        weight: Any = module.weight
        if tensor_identity(weight) in counted:
            continue
        counted.add(tensor_identity(weight))
        less = 2 * weight.numel() - _stored_bytes(weight, scheme, type(module).__name__)
        parts = path.split(".")
        for length in range(len(parts) + 1):
            prefix = ".".join(parts[:length])
            saved[prefix] += less
    reduced = {each: size - saved[each] for each, size in sizes.items()}
    how = f"{len(counted)} linear layers: {scheme.how}; the rest in bfloat16"
    return _row(name, reduced, layers, how)


def _stored_bytes(weight: torch.Tensor, scheme: _Scheme, kind: str) -> int:
    size = weight.numel()
    rows = weight.size(1) if kind == "Conv1D" else weight.size(0)  # GPT-2's layer has its weight transposed
    scales = math.ceil(size / scheme.block) if scheme.block else rows
    return math.ceil(size * scheme.element_bytes) + math.ceil(scales * scheme.scale_bytes) + scheme.fixed_bytes
