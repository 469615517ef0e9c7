"""Files that `torch.save` wrote, read as tensors and plain values alone.

The one place where a pickle is read, and only as ``weights_only=True`` reads it: by torch's own restricted reader,
which makes tensors, containers, numbers and text, and refuses every other class and function.
"""

from __future__ import annotations

import re
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError  # the name of an error alone
from typing import Any

import torch

from accel_state.errors import CheckpointError

__all__ = ["load", "load_bytes"]

_FAILURES = (
    UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
    AssertionError, struct.error,
)  # fmt: skip
"""What torch's reader raises at bytes that are no such file."""


def load(path: Path, *, arrays: bool = False) -> Any:
    """What is in a file; tensors are mapped from it where it allows that, so that they take no memory.

    Args:
        path: of the file.
        arrays: whether arrays of numpy's unsigned 32-bit integers may be in it: the state of its generator is one.

    Raises:
        CheckpointError: if it is damaged, or holds something else.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_array_names() if arrays else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _FAILURES as error:
        raise _refusal(str(path), error) from error


def load_bytes(content: memoryview, what: str) -> Any:
    """The same of bytes that were written by `torch.save`.

    Raises:
        CheckpointError: if they are damaged, or hold something else.
    """
    try:
        return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except _FAILURES as error:
        raise _refusal(what, error) from error


def _array_names() -> list[Any]:
    """What an array of ``uint32`` is made of. An array of objects is still refused: its dtype is another class."""
    import numpy as np

    rebuild = np.zeros(0).__reduce__()[0]
    names = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")
    return [*((rebuild, name) for name in names), np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def _refusal(what: str, error: Exception) -> CheckpointError:
    # torch's own text advises to read the file without restraint; only what it names is of use.
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is not None:
        return CheckpointError(
            f"`{what}` holds `{named[1]}` and not only tensors and plain values, and a pickle is never run in full, "
            f"since it does whatever it says. Write it again with such values only."
        )
    reason = error.__context__ if isinstance(error, UnpicklingError) and error.__context__ is not None else error
    said = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
    return CheckpointError(
        f"`{what}` cannot be read as tensors and plain values ({said[:200]}): it is damaged, or no file of "
        f"`torch.save`. Restore it, then convert again."
    )
