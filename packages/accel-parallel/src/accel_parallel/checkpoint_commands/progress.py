"""A bar of bytes on the terminal's error stream; none where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["bytes_bar"]


@contextmanager
def bytes_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """While this is open, the bar shows.

    Args:
        total: bytes in all.
        what: is being done, in a word.

    Yields:
        What is to be called with the bytes of each step; from any thread.
    """
    # Not `accel_state.logging.tqdm`: that asks the open process, and so loads torch.
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg, unused-ignore]
        monitor_interval = 0  # no thread of its own: steps are short

    bar: Any = Bar(total=total, desc=what, unit="B", unit_scale=True, disable=None, leave=False)
    with bar:
        yield lambda count: bar.update(count) and None
