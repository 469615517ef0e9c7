"""Small safetensors files, written without the library, which is not there where a package is tested alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from accel_state.tensor_format import TensorShape, bytes_of, file_header, order_in_file

__all__ = ["save_file"]


def save_file(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write `tensors` to a file, as the function of that name in ``safetensors.torch`` does."""
    shapes = {name: TensorShape(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with Path(path).open("wb") as stream:
        stream.write(file_header(shapes))
        for name in order_in_file(shapes):
            stream.write(bytes_of(tensors[name]))
