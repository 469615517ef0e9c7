"""All ranks go on, or all stop: what one of them refuses is not left to the others' time-out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xxhash

from accel_state.collectives import gather
from accel_state.errors import CollectiveError, ConfigError
from accel_state.process import Process

__all__ = ["together"]


@contextmanager
def together(what: str, process: Process) -> Iterator[Callable[[Any], None]]:
    """Every rank must come here. All leave the block or all raise: what one refuses, and where they differ.

    The function that it gives takes what must be alike on all ranks.
    """
    alike: list[Any] = []
    try:
        yield alike.append
    except ConfigError:
        _gather_digests(None, process)
        raise
    digests = _gather_digests(json.dumps(alike, sort_keys=True), process)
    refused = [rank for rank, (passed, _) in enumerate(digests) if not passed]
    if refused:
        raise CollectiveError(
            f"Rank(s) {refused} refused what {what} was given, so the other stages have nobody to work with. See the "
            f"error there, and give every rank the same."
        )
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise CollectiveError(
            f"Rank(s) {others} gave {what} other shapes or settings than rank 0, and the stages work on one batch. "
            f"Give every rank the same inputs: from a loader that is not divided over ranks, or from rank 0 by "
            f"`broadcast`."
        )


def _gather_digests(text: str | None, process: Process) -> list[list[int]]:
    """On every rank, each rank's (1, digest); (0, 0) from one that has nothing to give."""
    own = [0, 0] if text is None else [1, xxhash.xxh64_intdigest(text.encode()) >> 1]
    gathered: list[list[int]] = gather(torch.tensor([own], device=process.device), process=process).tolist()
    return gathered
