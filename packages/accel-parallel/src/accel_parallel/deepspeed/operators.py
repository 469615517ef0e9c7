"""DeepSpeed's operators for the host, compiled when they are first used: to see what that waits for, or do it early.

torch keeps others from compiling the same by a file ``lock`` beside the build, and waits for it without a word. One
that a killed process has left is waited for without end.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from accel_state.env import told_to_others
from accel_state.logging import get_logger

__all__ = ["build_operators", "tell_of_locks"]

logger = get_logger(__name__)

_COMMUNICATION = "deepspeed_shm_comm"
_STALE_S = 600.0


def tell_of_locks() -> None:
    """Say aloud which lock of the operator that every run on a CPU needs will be waited for."""
    for lock, age in _locks():
        if lock.parent.name == _COMMUNICATION:
            logger.warning(
                "DeepSpeed's operator %s is being compiled since %.0f s, and this process waits for that. If no "
                "process is compiling any more, it was killed: remove %s, and everybody goes on.",
                lock.parent.name,
                age,
                lock,
            )


def build_operators(*, stale_s: float = _STALE_S) -> list[str]:
    """Compile what runs on a CPU use, where it is not compiled yet: communication within a host, and CPU Adam.

    Takes a minute or several the first time. Call it once a machine, before processes are launched.

    Args:
        stale_s: locks older than this are of processes that were killed, and are removed.

    Returns:
        Names of the operators that can be used now.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from deepspeed.ops.op_builder.cpu import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        ShareMemCommBuilder,
    )

    for lock, age in _locks():
        if age > stale_s:
            lock.unlink(missing_ok=True)
    built = []
    for builder in (ShareMemCommBuilder(), CPUAdamBuilder()):
        builder.load(verbose=False)
        built.append(str(builder.NAME))
    return built


def _locks() -> list[tuple[Path, float]]:
    """Those that there are, and the seconds since each was made. Other processes remove theirs meanwhile."""
    from torch.utils.cpp_extension import get_default_build_root

    root = told_to_others("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    found = []
    for folder, _, names in os.walk(root):
        if "lock" in names:
            with suppress(FileNotFoundError):
                lock = Path(folder, "lock")
                found.append((lock, time.time() - lock.stat().st_mtime))
    return sorted(found)
