"""Offload to the host or to a file system: which stages have it, and whether its folder can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from accel_parallel.deepspeed.settings import Settings
from accel_state.errors import ConfigError

__all__ = ["check_offload", "probe"]

_PROBE_BYTES = 4096
"""A block of a file system: what is full has no room for one more."""


def check_offload(settings: Settings, stage: int) -> None:
    """Refuse offload that the stage does not have.

    Raises:
        ConfigError: with the stage and the device.
    """
    for name, least, what in (("optimizer", 1, "optimizer states"), ("param", 3, "parameters")):
        key = f"zero_optimization.offload_{name}.device"
        device = settings.given(key)
        if device in ("cpu", "nvme") and stage < least:
            raise ConfigError(
                f"`{key}` is {device!r} ({settings.source(key)}), and `zero_optimization.stage` is {stage} "
                f"({settings.source('zero_optimization.stage')}): only what is divided is offloaded, and {what} are "
                f"from stage {least} on. Set `zero_stage={least}`, or leave the offload out."
            )


def probe(settings: Settings) -> None:
    """Write and remove a file where something is to be offloaded to a file system, before anything is built.

    The folder is made if it is missing, as DeepSpeed would.

    Raises:
        ConfigError: for a folder that cannot be written, a missing one, or one without effect.
    """
    for name in ("optimizer", "param"):
        section = f"zero_optimization.offload_{name}"
        device, path = settings.given(f"{section}.device"), settings.given(f"{section}.nvme_path")
        if device == "nvme" and not path:
            raise ConfigError(
                f"`{section}.device` is 'nvme' ({settings.source(f'{section}.device')}), and no folder is given. "
                f"Set `offload_{name}_nvme_path` to one on that device, or offload to 'cpu'."
            )
        if device == "nvme":
            _write_into(Path(path), f"{section}.nvme_path", settings.source(f"{section}.nvme_path"))
        elif path and device != "nvme":
            raise ConfigError(
                f"`{section}.nvme_path` is {str(path)!r} ({settings.source(f'{section}.nvme_path')}), which has no "
                f"effect with `{section}.device` {device!r}. Set `offload_{name}_device='nvme'`, or leave it out."
            )


def _write_into(folder: Path, key: str, source: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".accel-probe-") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"`{key}` is {str(folder)!r} ({source}), and nothing can be written there: {error.strerror or error}. "
            f"Give a folder on a local NVMe device that this user may write and that has room."
        ) from None
