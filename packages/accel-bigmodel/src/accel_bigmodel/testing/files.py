"""Small safetensors files, written without the library, which is not there where a package is tested alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from accel_bigmodel.stored import map_tensor, read_file_header
from accel_state.tensor_format import TensorShape, bytes_of, file_header, order_in_file

__all__ = ["load_file", "save_file"]


def save_file(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write `tensors` to a file, as the function of that name in ``safetensors.torch`` does."""
    shapes = {name: TensorShape(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with Path(path).open("wb") as stream:
        stream.write(file_header(shapes))
        for name in order_in_file(shapes):
            stream.write(bytes_of(tensors[name]))


def load_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, in memory of its own."""
    return {name: map_tensor(stored).clone() for name, stored in read_file_header(path).items()}
