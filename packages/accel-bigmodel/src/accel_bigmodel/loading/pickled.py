"""Checkpoints that `torch.save` wrote, mapped as tensors alone.

The one place of this package where a pickle is read, and only as ``weights_only=True`` reads it: by torch's own
restricted reader, which makes tensors, containers, numbers and text, and refuses every other class and function.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # the name of an error alone
from typing import Any

import torch

from accel_state.errors import CheckpointError

__all__ = ["MappedTensor", "read_pickled"]

_FAILURES = (
    UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
    AssertionError,
)  # fmt: skip
"""What torch's reader raises at bytes that are no such file."""


@dataclass(frozen=True, slots=True, eq=False)
class MappedTensor:
    """A tensor whose memory is a file. In a rank that does not see the file, one without values."""

    path: Path
    """The file."""
    name: str
    """What the file calls it."""
    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dims."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return self.tensor.numel() * self.tensor.dtype.itemsize


def read_pickled(path: Path) -> dict[str, MappedTensor]:
    """Every tensor of one file. No values are read before they are looked at.

    Raises:
        CheckpointError: if the file is damaged, of the form before torch 1.6, or holds anything but tensors by name.
        OSError: if it cannot be read.
    """
    with path.open("rb") as stream:  # what is missing or locked is told as such
        first = stream.read(2)
    if not zipfile.is_zipfile(path):
        why = "it ends early: no archive ends where it does" if first == b"PK" else "torch before 1.6 wrote it, or none"
        raise CheckpointError(
            f"`{path}` cannot be mapped into memory ({why}), so loading it would take its size of memory again. Copy "
            f"or download it again, or write it anew as safetensors."
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _FAILURES as error:
        raise _refusal(path, error) from error
    return {name: MappedTensor(path, name, tensor) for name, tensor in _only_tensors(path, found)}


def _only_tensors(path: Path, found: Any) -> list[tuple[str, torch.Tensor]]:
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"`{path}` holds a {type(found).__name__} and not tensors by name. Save the model's `state_dict()`."
        )
    for name, value in found.items():
        if isinstance(value, Mapping) and any(isinstance(each, torch.Tensor) for each in value.values()):
            raise CheckpointError(
                f"`{path}` holds tensors under {name!r} and not at its top, as a checkpoint of a training does. Save "
                f"the part {name!r} of it alone, as safetensors if you can."
            )
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"`{path}` holds {name!r}, a {type(value).__name__}, among its tensors. Leave out what is no tensor."
            )
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise CheckpointError(
                f"`{path}` holds {name!r} as a tensor of layout {value.layout} and dtype {value.dtype} on "
                f"{value.device}, which has no plain values to load. Save it dense and unquantized."
            )
    return [(name, value.detach()) for name, value in found.items()]


def _refusal(path: Path, error: Exception) -> CheckpointError:
    # torch's own text advises to read the file without restraint; only what it names is of use.
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is not None:
        return CheckpointError(
            f"`{path}` holds `{named[1]}` and not only tensors, and a pickle is never run in full, since it does "
            f"whatever it says. Save the `state_dict()` alone, as safetensors if you can."
        )
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return CheckpointError(
        f"`{path}` cannot be read as tensors ({said[:200]}): it is damaged, or no file of `torch.save`. Copy or "
        f"download it again."
    )
