"""The errors that every package raises.

Every message has three parts: what was given, why it cannot work, and what to change.
"""

from __future__ import annotations

__all__ = [
    "AccelError",
    "BatchSizeError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "MissingDependencyError",
]


class AccelError(Exception):
    """Base of all errors that these packages raise on purpose."""


class ConfigError(AccelError, ValueError):
    """A setting, an argument or a combination of them that cannot work."""


class CheckpointError(AccelError, RuntimeError):
    """A checkpoint that is missing, incomplete, corrupt, or does not fit what is being restored."""


class CollectiveError(AccelError, RuntimeError):
    """Processes called a collective with arguments that do not fit together."""


class MissingDependencyError(AccelError, ImportError):
    """An optional third-party package is needed and not installed.

    Args:
        package: name of the distribution to install.
        purpose: what was asked for that needs it, as the end of "... is needed for".
        install: the line that installs it; by default ``pip install <package>``.
    """

    def __init__(self, package: str, *, purpose: str, install: str | None = None) -> None:
        line = install or f"pip install {package}"
        super().__init__(f"`{package}` is needed for {purpose}, but it is not installed here. Install it: {line}")
        self.package = package


class BatchSizeError(AccelError, RuntimeError):
    """No batch size fits into memory.

    Args:
        message: all three parts.
        tried: the sizes that failed, in order.
    """

    def __init__(self, message: str, *, tried: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tried = tried
