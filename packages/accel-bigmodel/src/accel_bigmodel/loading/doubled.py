"""Tensors that are one in the model and stored twice: one of them would be lost without a word."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from accel_bigmodel.loading.delivery import OpenFiles, ReadSettings, pieces_of
from accel_bigmodel.loading.match import Match
from accel_bigmodel.loading.source import Source
from accel_state.errors import CheckpointError

__all__ = ["check_doubled"]


def check_doubled(matched: Match, sources: Mapping[str, Source], settings: ReadSettings) -> None:
    """Read both of each pair, in pieces, and compare them.

    Raises:
        CheckpointError: if they differ in shape, dtype or any bit, or a file was cut short.
        OSError: if one cannot be read.
    """
    for first, second in matched.doubled:
        if not _are_same(sources[first], sources[second], settings.chunk_bytes):
            raise CheckpointError(
                f"`{first}` and `{second}` are one tensor in the model, but the checkpoint holds different values for "
                f"them, and those of `{second}` would be lost. Untie them in the model's configuration (in "
                f"transformers `tie_word_embeddings=False`), or give `strict=False` to load `{first}` alone."
            )


def _are_same(first: Source, second: Source, limit: int) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    raw = [torch.empty(min(limit, max(first.nbytes, 1)), dtype=torch.uint8) for _ in range(2)]
    with OpenFiles.of([first, second]) as files:
        for one, other in zip(pieces_of(first, limit), pieces_of(second, limit), strict=True):
            files.read(one, raw[0])
            files.read(other, raw[1])
            if not torch.equal(raw[0][: one.nbytes], raw[1][: one.nbytes]):
                return False
    return True
