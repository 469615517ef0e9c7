"""What each library that quantizes is asked for, and whether it is here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import nn

from accel_state.errors import ConfigError, MissingDependencyError

__all__ = ["Backend", "require"]


class Backend(Protocol):
    """Makes quantized layers. One object serves one model."""

    def check_layer(self, name: str, layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        """Refuse, by ConfigError, a layer that cannot be quantized on `device` from weights of `dtype`."""

    def stand_in(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """What takes the place of `layer`: with its bias, and with a weight without values, or `layer` itself."""

    def fill(self, module: Any, weight: torch.Tensor, device: torch.device) -> None:
        """Give `module`, a stand-in, `weight` quantized on `device`. No more of `weight` is kept."""

    def is_part(self, rest: str) -> bool:
        """Whether a checkpoint of a quantized model keeps what belongs to a weight under ``<layer>.<rest>``."""

    def restore(
        self, name: str, module: Any, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        """Give `module` a weight that was quantized before: as its ``state_dict`` has it, with its parts.

        Raises:
            ConfigError: if it was quantized to another type than is asked for now.
        """

    def mark(self, model: nn.Module) -> None:
        """Tell other libraries, such as peft, what `model` now is."""


def require(package: str, minimum: str, purpose: str) -> Any:
    """Import `package`.

    Raises:
        MissingDependencyError: if it is not installed, or is older than `minimum`.
    """
    install = f"pip install '{package}>={minimum}'"
    try:
        module = importlib.import_module(package)
        found = metadata.version(package)
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        if getattr(error, "name", package) != package:
            raise
        raise MissingDependencyError(package, purpose=purpose, install=install) from error
    if _release(found) < _release(minimum):
        raise ConfigError(
            f"{package} {found} is installed, but {purpose} needs {minimum} or newer, the oldest whose layers these "
            f"are. Install it: {install}"
        )
    return module


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 46) of ``0.46.0.dev0`` and of ``0.46``."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(each for each in part if each.isdigit()) or 0) for part in parts)
