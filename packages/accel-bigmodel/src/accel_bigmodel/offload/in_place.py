"""Where the CPU computes: weights are used where they are, in host memory or in files that are mapped.

There is nothing to copy and nothing to hook. Pages of a mapped file come when they are first touched, and the system
takes them back without writing them when it needs the memory, so a model may be larger than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from accel_bigmodel.offload.division import HeldTensor
from accel_bigmodel.offload.streaming import Value, value_of
from accel_bigmodel.stored import StoredTensor, map_tensor

__all__ = ["place_on_host"]


def place_on_host(tensors: Iterable[HeldTensor], values: Mapping[str, Value]) -> None:
    """Have the model hold the values of `tensors` on the CPU, and those that lie in files as these files' memory.

    Args:
        tensors: from `group_tensors`.
        values: by one of their names, where the model itself holds nothing or something else.
    """
    for tensor in tensors:
        value = value_of(tensor, values)
        found = map_tensor(value) if isinstance(value, StoredTensor) else value.detach().to("cpu")
        if found is tensor.value:
            continue
        if value is not tensor.value:
            found = found.to(tensor.value.dtype)
        if isinstance(tensor.value, nn.Parameter):
            found = _like_parameter(found, tensor.value)
        for place in tensor.places:
            place.put(found)


def _like_parameter(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
