"""Whether DeepSpeed is there, new enough, and able to compile what it compiles at run time."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

from accel_state.errors import ConfigError

__all__ = ["LEAST_VERSION", "has_async_io", "has_compiler", "is_installed", "require_deepspeed"]

LEAST_VERSION = (0, 19)
"""The first that leaves accumulation windows to its caller (``managed_gradient_accumulation``)."""


def is_installed() -> bool:
    """Whether a package of that name can be imported. Imports nothing."""
    return importlib.util.find_spec("deepspeed") is not None


def require_deepspeed() -> ModuleType:
    """Import DeepSpeed, which takes seconds the first time.

    Raises:
        ConfigError: with the line that installs it, where it is missing or too old.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = None
    if found is None or not is_installed():
        raise ConfigError(
            f"A DeepSpeed plugin was given, and the package `deepspeed` is not installed here. "
            f"Install it: {install_line()}"
        )
    if _release(found) < LEAST_VERSION:
        raise ConfigError(
            f"DeepSpeed {found} is installed, which counts accumulation windows itself and cannot be told not to. "
            f"{'.'.join(map(str, LEAST_VERSION))} or newer is needed (`managed_gradient_accumulation`). "
            f"Install it: {install_line()} --upgrade"
        )
    import deepspeed  # type: ignore[import-untyped,import-not-found,unused-ignore]

    module: ModuleType = deepspeed
    return module


def install_line() -> str:
    """The command for this machine. Operators are compiled when first used, against the torch that is installed."""
    line = "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    accelerated = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    return line if accelerated else f"DS_ACCELERATOR=cpu {line}"


def has_compiler() -> bool:
    """Whether DeepSpeed's operators for the host, such as its CPU Adam, can be compiled here, or were when installed.

    They are built by ``torch.utils.cpp_extension``, which needs ninja, a C++ compiler and the headers of Python.
    """
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    compiler: str = get_cxx_compiler()  # type: ignore[no-untyped-call]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    tools = shutil.which(compiler) is not None and headers.is_file() and bool(is_ninja_available())
    return tools or _was_compiled("cpu_adam")


def has_async_io() -> bool:
    """Whether DeepSpeed's asynchronous file access, which NVMe offload needs, can be compiled here, or was.

    Besides what `has_compiler` finds it needs libaio. Tries to link it, which takes a second.

    Raises:
        ConfigError: where DeepSpeed is not installed.
    """
    require_deepspeed()
    if _was_compiled("async_io"):
        return True
    from deepspeed.ops.op_builder import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
        AsyncIOBuilder,
    )

    try:
        links = bool(AsyncIOBuilder().is_compatible(verbose=False))
    except ImportError:  # it links by distutils, which Python 3.12 has only with setuptools
        return False
    return links and has_compiler()


def _was_compiled(operator: str) -> bool:
    """Whether an operator came compiled with the package."""
    if not is_installed():
        return False
    from deepspeed.git_version_info import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
        installed_ops,
    )

    return bool(installed_ops.get(operator, False))


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])
